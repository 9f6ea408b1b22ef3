"""The rules that end a training, but for the one that samples pictures."""

from comfy_api.latest import io

from ..models.dvar import PRESETS, EvaluationSettings
from ..models.errors import ConfigError
from ..trainers.stopping import DVAR, FixedSteps
from . import _sockets
from ._choices import first_refusal, known

CUSTOM = "custom"
BUDGETS = {f"{name}, short": preset.short_steps for name, preset in PRESETS.items()} | {
    f"{name}, full": preset.full_steps for name, preset in PRESETS.items()
}
"""The authors' fixed numbers of steps by method: about as short as DVAR's runs, and of ordinary length."""


def preset_input(numbers: str) -> io.Input:
    """The methods for which DVAR's authors give numbers, and custom.

    Args:
        numbers: what they give, to follow "The authors'".
    """
    return io.Combo.Input(
        "preset",
        options=[*PRESETS, CUSTOM],
        default="dreambooth",
        tooltip=f"The authors' {numbers} for a method; dreambooth suits LoRAs. custom takes the numbers below, which "
        "the others ignore.",
    )


def known_preset(preset: str | None) -> bool | str:
    """For validate_inputs: True, or the sentence that refuses it."""
    return known("preset", preset, [*PRESETS, CUSTOM])


class StopFixed(io.ComfyNode):
    """Train for a fixed number of steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeStopFixed",
            display_name="Stop: Fixed",
            category="personalize/training",
            description="Ends a training after a fixed number of steps.",
            inputs=[  # append only: workflows store widget values by position
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimizer steps, for the preset custom. The DCO authors use 2000 for a subject and 1000 "
                    "for a style.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *BUDGETS],
                    default=CUSTOM,
                    optional=True,
                    tooltip="The numbers of steps of DVAR's authors: "
                    + ", ".join(f"{steps} ({name})" for name, steps in BUDGETS.items())
                    + ". custom takes the number above.",
                ),
            ],
            outputs=[_sockets.Stopping.Output(display_name="stopping")],
        )

    @classmethod
    def validate_inputs(cls, preset=None) -> bool | str:
        return known("preset", preset, [CUSTOM, *BUDGETS])

    @classmethod
    def execute(cls, steps, preset=CUSTOM) -> io.NodeOutput:
        return io.NodeOutput(FixedSteps(BUDGETS.get(preset, steps)))


class StopDVAR(io.ComfyNode):
    """Train until the objective on one fixed batch no longer changes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeStopDVAR",
            display_name="Stop: DVAR",
            category="personalize/training",
            description="Ends a training when its loss on one fixed batch has become flat: two to eight times earlier "
            "than a fixed number of steps, at about the same quality.",
            inputs=[  # append only: workflows store widget values by position
                preset_input("window and eps"),
                io.Int.Input(
                    "window",
                    default=PRESETS["dreambooth"].window,
                    min=2,
                    max=1_000_000,
                    tooltip="Optimizer steps over which the loss must have been flat. Longer stops later. Only for the "
                    "preset custom.",
                ),
                io.Float.Input(
                    "eps",
                    default=PRESETS["dreambooth"].eps,
                    min=0.001,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="The window's share of the whole variance that counts as flat. Smaller stops later. Only "
                    "for the preset custom.",
                ),
                io.Int.Input(
                    "max_steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Most optimizer steps, and longer than the window; 0 takes the trainer's steps. The "
                    "authors allow "
                    + ", ".join(f"{preset.full_steps} ({name})" for name, preset in PRESETS.items())
                    + ".",
                ),
                io.Int.Input(
                    "every",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Optimizer steps between evaluations. 0 chooses them so that evaluating takes at most a "
                    "quarter of the time; the authors evaluate at every step.",
                ),
                io.Int.Input(
                    "eval_batch_size",
                    default=EvaluationSettings.batch_size,
                    min=1,
                    max=256,
                    tooltip="Rows of the evaluation batch. More make the loss steadier and each evaluation dearer.",
                ),
                io.Int.Input(
                    "eval_accumulation",
                    default=EvaluationSettings.accumulation,
                    min=1,
                    max=256,
                    tooltip="Forward passes per evaluation, each with other timesteps: a larger batch without more "
                    "memory.",
                ),
                io.String.Input(
                    "code",
                    default=EvaluationSettings.code,
                    tooltip="What stays the same at every evaluation, one digit each: images, latents, noise, "
                    "captions, timesteps. 1 keeps it, 0 draws it anew. 11111 is DVAR; the others are for experiments.",
                ),
                io.Boolean.Input(
                    "mean_latent",
                    default=False,
                    tooltip="Evaluate the mean of the pictures' latents in place of a draw.",
                ),
                io.Boolean.Input(
                    "mean_noise",
                    default=False,
                    tooltip="Evaluate without noise, which is its mean; an experiment of the authors.",
                ),
                io.Boolean.Input(
                    "intervals",
                    default=False,
                    tooltip="Also log the loss on the beginning, middle and end of the timesteps. Four times the work; "
                    "it decides nothing.",
                ),
            ],
            outputs=[_sockets.Stopping.Output(display_name="stopping")],
        )

    @classmethod
    def validate_inputs(cls, preset=None, code=None) -> bool | str:
        return first_refusal([known_preset(preset), _check_code(code)])

    @classmethod
    def execute(
        cls,
        preset,
        window,
        eps,
        max_steps=0,
        every=0,
        eval_batch_size=EvaluationSettings.batch_size,
        eval_accumulation=EvaluationSettings.accumulation,
        code=EvaluationSettings.code,
        mean_latent=False,
        mean_noise=False,
        intervals=False,
    ) -> io.NodeOutput:
        numbers = PRESETS.get(preset)
        evaluation = EvaluationSettings(
            batch_size=eval_batch_size,
            accumulation=eval_accumulation,
            code=code,
            mean_latent=mean_latent,
            mean_noise=mean_noise,
            intervals=intervals,
        )
        rule = DVAR(
            window=numbers.window if numbers else window,
            eps=numbers.eps if numbers else eps,
            max_steps=max_steps,
            every=every,
            evaluation=evaluation,
        )
        return io.NodeOutput(rule)


def _check_code(code: str | None) -> bool | str:
    try:
        EvaluationSettings(code=code) if code is not None else None
    except ConfigError as error:
        return str(error)
    return True
