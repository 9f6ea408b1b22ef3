"""Perfusion nodes: put concepts on a model, and sample several in one picture."""

import comfy.samplers
from comfy_api.latest import io

from ..models.perfusion import edm_sigmas
from . import _sampling_inputs, _sockets
from .guiding import SigmaRange, sample_latent
from .learned_tokens import teach
from .perfusion_prompts import encode, with_words
from .rank_one_edits import attach

GLOBAL_LOCKING = (
    "Keys, which decide where a concept goes, see the prompt with the superclass word in its place (the paper's global "
    "key locking). Keeps poses and layouts freer, and costs nothing while sampling."
)


class ApplyPerfusion(io.ComfyNode):
    """Concepts on a model and their words on a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeApplyPerfusion",
            display_name="Apply Perfusion",
            category="personalize/perfusion",
            description="Puts concepts on a model, without changing a weight, and their words on its CLIP "
            "(arXiv 2305.01644).",
            inputs=[
                io.Model.Input("model", tooltip="The family that the concepts were trained on. LoRAs may come before."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                _sockets.Concepts.Input("concepts", tooltip="From Load Perfusion Concept."),
                *_range(),
            ],
            outputs=[io.Model.Output(display_name="model"), io.Clip.Output(display_name="clip")],
        )

    @classmethod
    def execute(cls, model, clip, concepts, start_percent=0.0, end_percent=1.0) -> io.NodeOutput:
        return io.NodeOutput(*_applied(model, clip, concepts, start_percent, end_percent))


def _range() -> list[io.Input]:
    return _sampling_inputs.percents("the concepts set in. 0 is from the start.", "the concepts stop.")


def _applied(model, clip, concepts, start_percent: float, end_percent: float):
    for gated in concepts:
        clip = teach(clip, [gated.concept.embedding], gated.concept.name)
    return (attach(model, concepts, SigmaRange(start_percent, end_percent)) if concepts else model), clip


class PerfusionTextEncode(io.ComfyNode):
    """CLIP Text Encode with global key locking."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePerfusionTextEncode",
            display_name="Perfusion Text Encode",
            category="personalize/perfusion",
            description="Encodes a prompt with concepts twice: as it is for values, and with the superclass words for "
            "keys. Without global locking the ordinary CLIP Text Encode does.",
            inputs=[
                io.Clip.Input("clip", tooltip="From Apply Perfusion."),
                _sockets.Concepts.Input("concepts", tooltip="The same that were applied."),
                io.String.Input(  # no dynamic prompts, for which the page would turn {1} into 1
                    "text",
                    multiline=True,
                    tooltip="The prompt. {1}, {2} … stand for the concepts' words in their order.",
                ),
                io.Boolean.Input("global_locking", default=True, tooltip=GLOBAL_LOCKING),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, clip, concepts, text, global_locking) -> io.NodeOutput:
        return io.NodeOutput(encode(clip, with_words(text, concepts), concepts, global_locking=global_locking))


class KSamplerMultiConceptLocking(io.ComfyNode):
    """Apply Perfusion, two prompts and KSampler in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeKSamplerMultiConceptLocking",
            display_name="KSampler (Multi-Concept Locking)",
            category="personalize/perfusion",
            description="Samples one or several Perfusion concepts in one picture; everything in one node.",
            inputs=[
                io.Model.Input("model", tooltip="The family that the concepts were trained on."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                _sockets.Concepts.Input("concepts", tooltip="From Load Perfusion Concept."),
                io.String.Input(
                    "positive",
                    multiline=True,
                    default="a {1} sitting in a {2}",
                    tooltip="The prompt. {1}, {2} … stand for the concepts' words in their order; the words themselves "
                    "do, too.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="What the picture should not show; {1}, {2} … stand for words here, too.",
                ),
                _sampling_inputs.seed(),
                _sampling_inputs.steps(30),
                _sampling_inputs.scale("cfg", 6.0, "Guidance by the prompt; 6 is the authors'."),
                *_sampling_inputs.algorithm(),
                *_sampling_inputs.latent(),
                io.Boolean.Input("global_locking", default=True, tooltip=GLOBAL_LOCKING),
                *_range(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )

    @classmethod
    def validate_inputs(cls, sampler_name=None, scheduler=None) -> bool | str:
        return _sampling_inputs.known_algorithm(sampler_name, scheduler)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        concepts,
        positive,
        negative,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        latent_image,
        denoise,
        global_locking,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        model, clip = _applied(model, clip, concepts, start_percent, end_percent)
        prompts = (
            encode(clip, with_words(text, concepts), concepts, global_locking=global_locking)
            for text in (positive, negative)
        )
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*prompts)
        guider.set_cfg(cfg)
        return io.NodeOutput(sample_latent(guider, latent_image, seed, steps, sampler_name, scheduler, denoise))


class PerfusionEDMSchedule(io.ComfyNode):
    """The authors' noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeEDMSchedule",
            display_name="EDM Schedule (Perfusion)",
            category="personalize/perfusion",
            description="Noise levels as the Perfusion authors sample with Euler (arXiv 2206.00364, eq. 5). For "
            "Sampler Custom Advanced.",
            inputs=[
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="Number of denoising steps."),
                io.Float.Input(
                    "sigma_max",
                    default=14.6146,
                    min=0.001,
                    max=5000.0,
                    step=0.0001,
                    tooltip="Noise level of the start: that of Stable Diffusion's last training timestep.",
                ),
                io.Float.Input(
                    "sigma_min",
                    default=0.0292,
                    min=0.0001,
                    max=5000.0,
                    step=0.0001,
                    tooltip="Noise level of the last step: that of Stable Diffusion's first training timestep.",
                ),
                io.Float.Input(
                    "rho",
                    default=3.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="How much the steps crowd towards low noise; 3 is the authors', 7 the paper's.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, steps, sigma_max, sigma_min, rho) -> io.NodeOutput:
        return io.NodeOutput(edm_sigmas(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho))
