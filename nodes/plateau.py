"""The stopping rule that samples pictures: Stop: CLIP Plateau."""

from pathlib import Path

from comfy_api.latest import io

from ..models.dvar import PRESETS
from ..models.errors import ConfigError
from ..trainers.plateau import CLIPPlateau, PictureSettings
from . import _host, _sockets
from ._choices import first_refusal
from ._folders import JUDGES
from ._lines import lines_of
from ._network_folders import NONE, chosen_folder, folder_input, folder_version, known_folder, network_folders
from .stopping import known_preset, preset_input

_FILES = "clip_vision/"
"""Begins the names of single files in the list, so that they are told from folders."""


class StopCLIPPlateau(io.ComfyNode):
    """Train until sampled pictures no longer come closer to the training pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers, pictures = PRESETS["dreambooth"], PictureSettings
        return io.Schema(
            node_id="PersonalizeStopCLIPPlateau",
            display_name="Stop: CLIP Plateau",
            category="personalize/training",
            description="Ends a training when the pictures that it samples no longer become more like the training "
            "pictures, as CLIP sees them. Each check takes as long as sampling all its pictures.",
            inputs=[  # append only: workflows store widget values by position
                preset_input("patience, eps, sampling steps and guidance"),
                folder_input(
                    "clip_folder",
                    _clips(),
                    "The CLIP that compares pictures: a folder in models/scoring in transformers' layout, or a "
                    "file in models/clip_vision. The authors use ViT-B/32: openai/clip-vit-base-patch32.",
                ),
                io.Int.Input(
                    "patience",
                    default=numbers.clip_patience,
                    min=0,
                    max=1000,
                    tooltip="Checks in a row without improvement that are waited for; one more ends the training. Only "
                    "for the preset custom.",
                ),
                io.Float.Input(
                    "eps",
                    default=numbers.clip_eps,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="By how much the similarity must rise above the best so far to count as an improvement. "
                    "Only for the preset custom.",
                ),
                io.Int.Input(
                    "every",
                    default=CLIPPlateau.every,
                    min=1,
                    max=100_000,
                    tooltip="Optimizer steps between checks.",
                ),
                io.Int.Input(
                    "max_steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Most optimizer steps; 0 takes the trainer's steps. The rule needs patience + 2 checks, so "
                    "a shorter training cannot be stopped.",
                ),
                io.Int.Input(
                    "pictures",
                    default=pictures.count,
                    min=1,
                    max=256,
                    tooltip="Pictures per check. More make the similarity steadier and each check slower.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="What the pictures show, one prompt per line. Empty takes some of the prompts that the "
                    "training itself uses.",
                ),
                io.Int.Input(
                    "sampling_steps",
                    default=numbers.clip_sampling_steps,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps per picture; fewer make checks faster. Only for the preset custom.",
                ),
                io.Float.Input(
                    "guidance",
                    default=numbers.clip_guidance,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Classifier-free guidance of the pictures. Only for the preset custom.",
                ),
                io.Int.Input(
                    "seed",
                    default=pictures.seed,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of the pictures' noise, which is the same at every check, and of the choice of prompts.",
                ),
            ],
            outputs=[_sockets.Stopping.Output(display_name="stopping")],
        )

    @classmethod
    def validate_inputs(cls, preset=None, clip_folder=None) -> bool | str:
        return first_refusal([known_preset(preset), known_folder("CLIP", clip_folder, _clips())])

    @classmethod
    def fingerprint_inputs(cls, clip_folder=None, **_others) -> str:
        path = _clips().get(clip_folder)
        return _host.file_version(path) if path is not None and path.is_file() else folder_version(path)

    @classmethod
    def execute(
        cls,
        preset,
        clip_folder,
        patience,
        eps,
        every=CLIPPlateau.every,
        max_steps=0,
        pictures=PictureSettings.count,
        prompts="",
        sampling_steps=PictureSettings.steps,
        guidance=PictureSettings.guidance,
        seed=PictureSettings.seed,
    ) -> io.NodeOutput:
        if clip_folder == NONE:
            raise ConfigError(
                "the CLIP plateau has no CLIP to compare pictures with; put the files of openai/clip-vit-base-patch32 "
                "into models/scoring/clip-vit-base-patch32, or a CLIP-ViT into models/clip_vision, and choose it as "
                "clip_folder"
            )
        if numbers := PRESETS.get(preset):
            patience, eps = numbers.clip_patience, numbers.clip_eps
            sampling_steps, guidance = numbers.clip_sampling_steps, numbers.clip_guidance
        settings = PictureSettings(
            clip=chosen_folder(_clips(), clip_folder),
            count=pictures,
            prompts=tuple(lines_of(prompts)),
            steps=sampling_steps,
            guidance=guidance,
            seed=seed,
        )
        rule = CLIPPlateau(pictures=settings, patience=patience, eps=eps, every=every, max_steps=max_steps)
        return io.NodeOutput(rule)


def _clips() -> dict[str, Path]:
    """Where there is a CLIP for pictures, by the names in the list."""
    files = {f"{_FILES}{name}": _host.find_model_file("clip_vision", name) for name in _host.model_files("clip_vision")}
    return network_folders(JUDGES, "clip") | {name: path for name, path in files.items() if path is not None}
