"""A person as the decoder takes them in: tokens for cross-attention, and pictures for self-attention to share."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FormatError, IncompatibleModelError
from ..formats import FORMAT_KEY, read_header, read_safetensors, write_safetensors
from .resampler import IdentityTokens, Resampler, join_pictures

FORMAT = "lookahead-identity/1"
ENCODER_KEY = "personalize.encoder"
LONGEST = 4.0
"""Largest ratio of a reference picture's sides; of longer ones the middle is kept."""
SAMPLED = 65536
"""About how many numbers of each weight the fingerprint reads at most."""

Pictures = Literal["average", "concat", "one person each"]
"""What several pictures show: one person, whose tokens are averaged or strung together, or a person each."""


@dataclass(frozen=True)
class Identity:
    """One or more people, made from their pictures by an encoder."""

    tokens: IdentityTokens
    """Each (people, tokens, dim)."""
    latents: Tensor | None
    """The pictures through the VAE, not scaled for the UNet, (people, pictures, channels, height, width).

    None when there was no VAE: tokens can be used then, attention cannot be shared.
    """
    encoder: str
    """Fingerprint of the resampler that made the tokens; another one's adapter cannot read them."""

    @property
    def people(self) -> int:
        return len(self.tokens.cond)

    def check_made_by(self, resampler: Resampler, name: str) -> None:
        """Raise IncompatibleModelError unless this resampler made the tokens; ``name`` is the encoder's, for that."""
        if self.encoder != fingerprint(resampler):
            raise IncompatibleModelError(
                f"the identity was made by another encoder than {name}; encode the pictures again with {name}, or load "
                "the encoder that the identity was made by"
            )


def fingerprint(resampler: Resampler) -> str:
    """A name for a resampler's weights, the same for its half-precision copy.

    Of large weights it reads numbers spread over the whole: all of ViT-H's 83 million take seconds.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(resampler.state_dict().items()):
        spread = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(spread.to("cpu", torch.float16).contiguous().numpy())
    return digest.hexdigest()[:16]


def gather_identity(tokens: IdentityTokens, latents: Tensor | None, pictures: Pictures, encoder: str) -> Identity:
    """An identity from what was made of each picture.

    Args:
        tokens: each (pictures, tokens, dim).
        latents: (pictures, channels, height, width).
        pictures: ``one person each`` makes as many people as there are pictures; the others make one.
        encoder: fingerprint of the resampler.
    """
    if pictures == "one person each":
        joined = IdentityTokens(tokens.cond.contiguous(), tokens.uncond.contiguous())
        return Identity(joined, None if latents is None else latents.unsqueeze(1), encoder)
    joined = IdentityTokens(join_pictures(tokens.cond, pictures), join_pictures(tokens.uncond, pictures))
    return Identity(joined, None if latents is None else latents.unsqueeze(0), encoder)


def reference_sides(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Height and width of about ``side``² pixels in a picture's own proportions, both divisible by ``multiple``."""
    ratio = min(max(height / width, 1 / LONGEST), LONGEST)
    return tuple(
        multiple * max(1, math.floor(length / multiple + 0.5))
        for length in (side * math.sqrt(ratio), side / math.sqrt(ratio))
    )


def fit_reference(pictures: Tensor, side: int, multiple: int) -> Tensor:
    """Pictures scaled to reference_sides without distortion; what does not fit is cropped around the middle.

    Args:
        pictures: (batch, channels, height, width), between 0 and 1.
    """
    pictures = trim_long(pictures)
    height, width = pictures.shape[-2:]
    wanted = reference_sides(height, width, side, multiple)
    if wanted == (height, width):
        return pictures
    scale = max(wanted[0] / height, wanted[1] / width)
    sizes = [max(want, round(scale * length)) for want, length in zip(wanted, (height, width), strict=True)]
    return _middle(F.interpolate(pictures, sizes, mode="bicubic", antialias=True).clamp(0, 1), wanted)


def trim_long(pictures: Tensor) -> Tensor:
    """The middle of pictures (batch, channels, height, width) whose sides differ by more than LONGEST.

    Scaled until its shorter side fits, a line of pixels would take all memory.
    """
    longest = math.ceil(LONGEST * min(pictures.shape[-2:]))
    return _middle(pictures, [min(length, longest) for length in pictures.shape[-2:]])


def _middle(pictures: Tensor, sizes: Sequence[int]) -> Tensor:
    top, left = ((found - size) // 2 for found, size in zip(pictures.shape[-2:], sizes, strict=True))
    return pictures[..., top : top + sizes[0], left : left + sizes[1]]


def identity_tensors(identity: Identity) -> dict[str, Tensor]:
    """Tensors of the file, as they are."""
    tensors = {"tokens.cond": identity.tokens.cond, "tokens.uncond": identity.tokens.uncond}
    return tensors if identity.latents is None else tensors | {"latents": identity.latents}


def write_identity(path: Path, identity: Identity, metadata: Mapping[str, str], *, overwrite: bool = False) -> Path:
    """Write the file, complete or not at all; errors as write_safetensors."""
    metadata = dict(metadata) | {FORMAT_KEY: FORMAT, ENCODER_KEY: identity.encoder}
    return write_safetensors(path, identity_tensors(identity), metadata, overwrite=overwrite)


def read_identity(path: Path) -> Identity:
    """Read what write_identity wrote, on the CPU; FormatError when the file is damaged or something else."""
    path = Path(path)
    header = read_header(path)
    if header.format != FORMAT:
        raise FormatError(
            f"{path.name}: expected format {FORMAT!r}, found {header.format or 'a file of something else'!r}; choose "
            "a file that Save Identity made"
        )
    tensors, metadata = read_safetensors(path)
    names = {"tokens.cond": 3, "tokens.uncond": 3} | ({"latents": 5} if "latents" in tensors else {})
    if tensors.keys() != names.keys() or not metadata.get(ENCODER_KEY):
        raise FormatError(
            f"{path.name}: found {', '.join(sorted(tensors)) or 'no tensor'}, expected tokens.cond, tokens.uncond, "
            "maybe latents, and the fingerprint of their encoder; the file is damaged, save the identity again"
        )
    for name, axes in names.items():
        tensor = tensors[name]
        if tensor.ndim != axes or not tensor.numel() or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
            raise FormatError(_damaged(path, f"{name} is {found}, expected {axes} axes of fractions"))
        if not tensor.isfinite().all():
            raise FormatError(_damaged(path, f"{name} has values that are no numbers"))
    tokens = IdentityTokens(tensors["tokens.cond"], tensors["tokens.uncond"])
    latents = tensors.get("latents")
    if tokens.cond.shape != tokens.uncond.shape or (latents is not None and len(latents) != len(tokens.cond)):
        shapes = " and ".join(f"{name} of {tuple(tensors[name].shape)}" for name in names)
        raise FormatError(_damaged(path, f"found {shapes}, expected as many people and tokens in each"))
    return Identity(tokens, latents, metadata[ENCODER_KEY])


def _damaged(path: Path, problem: str) -> str:
    return f"{path.name}: {problem}; the file is damaged, save the identity again"
