"""From an encoder, its base and its image encoder to the authors' model_ckpt.pt, on disk alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import ConfigError, IncompatibleModelError
from ...models.formats import refuse_taken, safe_name
from ...models.lookahead.authors_export import authors_ranks, write_authors_file
from ...models.lookahead.encoder import read_encoder
from ..base import TrainingBase, open_base
from ..clip_vision import load_clip_vision
from ..config import build
from ..progress import Progress
from ..ranks import Ranks
from ..settings import BaseSettings
from .config import EncoderOutput

ENDING = ".pt"


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """A whole export from the command line."""

    base: BaseSettings
    """The SDXL model that the encoder was trained on; the file gets its UNet."""
    encoder: Path
    """The encoder."""
    clip_vision: Path
    """The image encoder that it reads, file or folder; the file gets it too."""
    output: EncoderOutput


@dataclass(frozen=True)
class Exported:
    """A file for the authors' code."""

    path: Path
    rank: int
    """Of the encoder's LoRA; 0 without one."""
    copy_rank: int
    tokens: int
    """Of the adapter."""
    word: bool
    """Whether the encoder predicts a word for the person, which their infer.py has no place for."""

    def __str__(self) -> str:
        return (
            f"saved {self.path}; the authors' infer.py reads it with --encoder_lora_rank {self.rank} "
            f"--kvcopy_lora_rank {self.copy_rank} --ip_adapter_tokens {self.tokens}"
            + ("; what predicts a word for the person is left out, as it refuses that" if self.word else "")
        )


def export(encoder: Path, base: TrainingBase, clip_vision: Path, path: Path, *, overwrite: bool = False) -> Exported:
    """Write the file, complete or not at all.

    Args:
        path: of the new file.

    Raises:
        ConfigError: there is a file already.
        FormatError: a file is damaged or something else, or the disk refused.
        IncompatibleModelError: encoder, base and image encoder do not belong together.
    """
    refuse_taken(path, overwrite=overwrite)
    if not base.family.size_conditioning:
        raise IncompatibleModelError(f"{base.name}: found {base.family.label}, face encoders are for SDXL; choose one")
    found = read_encoder(encoder)
    vision = load_clip_vision(clip_vision, torch.float16, "cpu")  # theirs stays in half precision
    if vision.width != found.resampler.picture_dim:
        raise IncompatibleModelError(
            f"{vision.name} gives hidden states of {vision.width} numbers, {found.name} reads "
            f"{found.resampler.picture_dim}; choose the CLIP-Vision model that it was trained with"
        )
    tensors = {key: value for key, value in vision.module.state_dict().items() if "position_ids" not in key}
    write_authors_file(path, found, _unet(base), tensors, overwrite=overwrite)
    rank, copy_rank = authors_ranks(found)
    return Exported(path, rank, copy_rank, found.resampler.latents.shape[1], found.word is not None)


def _unet(base: TrainingBase) -> dict[str, Tensor]:
    """The base's weights by diffusers' names, in its own precision."""
    component = base.unet
    return component.fit(component.build(), component.weights.read(component.names))


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``lookahead-export`` recipe; values as in export.example.toml."""
    settings = build(ExportRun, values)
    if ranks.count > 1:
        raise ConfigError("a file is exported in one process; start it without accelerate launch")
    out = settings.output
    path = out.folder / "lookahead_encoders" / f"{safe_name(out.name)}{ENDING}"
    base = open_base(settings.base.path)
    print(export(settings.encoder, base, settings.clip_vision, path, overwrite=out.overwrite))
    return 0
