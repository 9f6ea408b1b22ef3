"""From the authors' model_ckpt.pt, 15 GB of which training changed 0.86, to a slim encoder and what was left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, IncompatibleModelError
from ..mapped import map_weights
from . import authors_file
from .authors_file import AuthorsCheckpoint, deviation
from .encoder import LookaheadEncoder
from .encoder_parts import example, read_parts

_NAMED = 5
"""How many differing weights the report names."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of the file's numbers, and whether those that were left out are the base model's."""

    source: str
    kept: int
    """Numbers in the slim file."""
    left_out: int
    """Numbers of the frozen UNet, its copies and CLIP-Vision; what a file stores twice is counted once."""
    full_copies: int
    """Transformer blocks whose keys' and values' copies are kept whole, since no change of attn1 describes them."""
    compared: int = 0
    """Weights of the frozen UNet that were compared with the base model's; 0 when no base was given."""
    differing: tuple[str, ...] = ()
    """Names of those that differ by more than rounding, in diffusers' form."""
    largest: float = 0.0
    """Largest absolute difference among all that were compared."""

    def __str__(self) -> str:
        lines = [
            f"{self.source}: kept {self.kept:,} numbers ({2 * self.kept / 1e9:.2f} GB in half precision), left out "
            f"{self.left_out:,} of the frozen UNet and image encoder."
        ]
        if self.full_copies:
            lines.append(f"{self.full_copies} blocks have keys and values of their own, which are kept whole.")
        if not self.compared:
            lines.append(
                "The frozen UNet was not compared with a base model; if the encoder was trained on another one than "
                "you sample with, likeness suffers."
            )
        elif not self.differing:
            lines.append(
                f"All {self.compared} frozen weights are the base model's, within rounding (largest difference "
                f"{self.largest:.2g})."
            )
        else:
            named = ", ".join(self.differing[:_NAMED])
            lines.append(
                f"{len(self.differing)} of {self.compared} frozen weights differ from the base model's, by up to "
                f"{self.largest:.2g} ({named}): the encoder was trained on another base; choose that one."
            )
        return "\n".join(lines)


def convert_checkpoint(
    source: Path,
    base: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    dtype: torch.dtype = torch.float16,
) -> tuple[LookaheadEncoder, ConversionReport]:
    """Take what training changed out of an authors' checkpoint, and compare the rest with the base model.

    One tensor at a time is read; the encoder alone is in memory afterwards.

    Args:
        base: the UNet's weights by diffusers' names, best as views of the file (models/mapped.py); None: not compared.
        progress: called before each of ``total`` pieces of work and once at the end; cancels by raising.
        dtype: of the encoder's tensors.

    Raises:
        FormatError: the file is damaged, or no checkpoint of the authors.
        IncompatibleModelError: the base is another kind of UNet.
    """
    source = Path(source)
    tensors, _ = map_weights(source)
    if not any(authors_file.MARK in key for key in tensors):
        raise FormatError(
            f"{source.name}: found no checkpoint of LCM-Lookahead's authors; other files load without conversion"
        )
    checkpoint = authors_file.sort_checkpoint(tensors, source.name)
    if base is not None:
        _check_shapes(checkpoint, base)
    total = len(checkpoint.blocks) + (0 if base is None else len(base))
    kept, full = checkpoint.trained(), 0
    for done, block in enumerate(checkpoint.blocks):
        progress(done, total)
        copies = checkpoint.copies(block)
        full += any(key.endswith(".weight") for key in copies)
        kept |= copies
    largest, differing = 0.0, []
    for done, name in enumerate(base or (), len(checkpoint.blocks)):
        progress(done, total)
        off, rounded = deviation(checkpoint.base[name], base[name])
        largest = max(largest, off)
        if not rounded:
            differing.append(name)
    encoder = LookaheadEncoder(*read_parts(kept, source.name, dtype), source.name, {})
    progress(total, total)
    report = ConversionReport(
        source=source.name,
        kept=sum(tensor.numel() for tensor in kept.values()),
        left_out=checkpoint.frozen_parameters(),
        full_copies=full,
        compared=0 if base is None else len(base),
        differing=tuple(differing),
        largest=largest,
    )
    return encoder, report


def _check_shapes(checkpoint: AuthorsCheckpoint, base: Mapping[str, Tensor]) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in checkpoint.base.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in base.items()}
    different = {name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)}
    if different:
        raise IncompatibleModelError(
            f"{checkpoint.name}: its UNet and the base model's differ in {len(different)} weights' names or shapes"
            f"{example(different)}; choose the SDXL checkpoint that the encoder was trained on, or none"
        )
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            raise IncompatibleModelError(
                f"{checkpoint.name}: the base model's {name} is {str(tensor.dtype).removeprefix('torch.')}; compare "
                "with a checkpoint in ordinary floating point, or with none"
            )
