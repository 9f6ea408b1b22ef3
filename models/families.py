"""The model families we personalize and the conventions that shapes alone do not tell."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EncoderSlot:
    """One CLIP text encoder of a family and how its output conditions the UNet."""

    key: str
    """Name in embedding files: ``clip_l``, ``clip_g`` or ``clip_h``."""
    layer: Literal["last", "penultimate"]
    """Hidden layer handed to the UNet's cross-attention."""
    final_norm: bool
    """Whether the final layer norm is applied to that layer."""
    pad_with_end: bool
    """Prompts are padded with the end token when true, with id 0 otherwise."""
    activation: str
    """MLP activation; not recoverable from weights."""


@dataclass(frozen=True)
class Family:
    """A family of latent diffusion models that share architecture conventions."""

    name: str
    label: str
    encoders: tuple[EncoderSlot, ...]
    resolution: int
    """Side in pixels that the base was trained at."""
    latent_scale: float
    """Factor between the autoencoder's latents and those the UNet sees."""
    head_dim: int | None
    """Channels per attention head; None where the number of heads is fixed instead."""
    heads: int | None
    """Number of attention heads; None where the channels per head are fixed instead."""
    size_conditioning: bool
    """SDXL's micro-conditioning on original size, crop and target size, with a pooled text embedding."""


SD15 = Family(
    name="sd15",
    label="SD1.5",
    encoders=(EncoderSlot("clip_l", "last", True, True, "quick_gelu"),),
    resolution=512,
    latent_scale=0.18215,
    head_dim=None,
    heads=8,
    size_conditioning=False,
)
SD21 = Family(
    name="sd21",
    label="SD2.1",
    encoders=(EncoderSlot("clip_h", "penultimate", True, False, "gelu"),),
    resolution=768,
    latent_scale=0.18215,
    head_dim=64,
    heads=None,
    size_conditioning=False,
)
SDXL = Family(
    name="sdxl",
    label="SDXL",
    encoders=(
        EncoderSlot("clip_l", "penultimate", False, True, "quick_gelu"),
        EncoderSlot("clip_g", "penultimate", False, False, "gelu"),
    ),
    resolution=1024,
    latent_scale=0.13025,
    head_dim=64,
    heads=None,
    size_conditioning=True,
)

FAMILIES = {family.name: family for family in (SD15, SD21, SDXL)}
