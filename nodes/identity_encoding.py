"""What the host's CLIP-Vision and VAE make of pictures of a person."""

import copy

import comfy.clip_vision
import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor

from ..models.errors import ConfigError, IncompatibleModelError
from ..models.lookahead import IdentityTokens, encode_identity
from ..models.lookahead.encoder import LookaheadEncoder
from ..models.lookahead.identity import Identity, Pictures, fingerprint, fit_reference, gather_identity, trim_long
from . import _host

LATENT_MULTIPLE = 8
"""The UNets halve a latent's sides two or three times."""
VISION_NAMES = {1024: "ViT-L/14", 1152: "SigLIP", 1280: "ViT-H/14", 1664: "ViT-bigG/14"}
"""Width -> what the host's image encoders of that width are called."""


def identity_of(
    encoder: LookaheadEncoder, clip_vision: ClipVisionModel, image: Tensor, pictures: Pictures, side: int, vae=None
) -> Identity:
    """An identity on the host's device for intermediate results; nothing stays on the one that computes.

    Args:
        image: (batch, height, width, channels) in 0..1, grey, coloured or with transparency.
        side: of the square with as many pixels as the reference picture gets.
        vae: of an SDXL checkpoint; without it there are no reference latents.

    Raises:
        IncompatibleModelError: CLIP-Vision or VAE is of another kind.
        ConfigError: there is no picture, or it is damaged.
    """
    _require_vision(clip_vision, encoder)
    if vae is not None:
        _require_picture_vae(vae)
    shown = _colours(image)
    with _host.memory_given_back():
        tokens = _tokens(encoder, clip_vision, shown)
        latents = None if vae is None else _reference_latents(vae, shown, side)
    return gather_identity(tokens, latents, pictures, fingerprint(encoder.resampler))


def _require_vision(clip_vision: ClipVisionModel, encoder: LookaheadEncoder) -> None:
    """Refuse an image encoder of another width or kind before anything is computed."""
    vision = getattr(clip_vision.model, "vision_model", None)
    found = None if vision is None else vision.post_layernorm.weight.shape[0]
    if found != (wanted := encoder.resampler.picture_dim):
        kind = "no CLIP" if found is None else _vision(found)
        raise IncompatibleModelError(
            f"{encoder.name}: needs a CLIP-Vision model that is {_vision(wanted)}, the one connected is {kind}; load "
            "another file with Load CLIP Vision"
        )


def _vision(width: int) -> str:
    return f"{VISION_NAMES[width]} ({width} wide)" if width in VISION_NAMES else f"{width} wide"


def _require_picture_vae(vae) -> None:
    if (vae.latent_channels, vae.latent_dim) != (4, 2):
        raise IncompatibleModelError(
            f"this VAE makes latents of {vae.latent_channels} channels and {vae.latent_dim} axes, SDXL's makes 4 and "
            "2; connect the VAE of the SDXL checkpoint"
        )


def _colours(image: Tensor) -> Tensor:
    """Host pictures, grey, coloured or with transparency -> (batch, 3, height, width) in 0..1."""
    if image.ndim != 4 or not image.numel():
        raise ConfigError(f"the image has shape {tuple(image.shape)}, expected at least one picture; load another")
    if not image.isfinite().all():
        raise ConfigError("the image has values that are no numbers; find the node that made them, or load another")
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, -1, 3)
    # Contiguous, as the host's own pictures are: the last bit of a convolution depends on the layout in memory.
    return trim_long(image.contiguous().movedim(-1, 1)).float().clamp(0, 1)


def _tokens(encoder: LookaheadEncoder, clip_vision: ClipVisionModel, shown: Tensor) -> IdentityTokens:
    """Tokens of each picture, (pictures, tokens, dim), in float32 where the host keeps its intermediate results.

    The resampler's copy on the device lives as long as this call.
    """
    device, keep = clip_vision.load_device, comfy.model_management.intermediate_device()
    bytes_needed = 4 * sum(weight.numel() for weight in encoder.resampler.parameters())
    comfy.model_management.load_models_gpu([clip_vision.patcher], memory_required=bytes_needed)

    def hidden_states(pixels: Tensor) -> Tensor:
        return clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1].float()

    pixels = comfy.clip_vision.clip_preprocess(
        shown.movedim(1, -1).to(device),
        size=clip_vision.image_size,
        mean=clip_vision.image_mean,
        std=clip_vision.image_std,
    )
    resampler = copy.deepcopy(encoder.resampler).to(device, torch.float32)
    tokens = encode_identity(resampler, hidden_states, pixels)
    return IdentityTokens(tokens.cond.to(keep), tokens.uncond.to(keep))


def _reference_latents(vae, shown: Tensor, side: int) -> Tensor:
    """The pictures through the VAE, (pictures, channels, height, width); the mean of what it encodes, without noise."""
    fitted = fit_reference(shown, side, LATENT_MULTIPLE * vae.spacial_compression_encode())
    latents = vae.encode(fitted.movedim(1, -1))
    if not latents.isfinite().all():
        raise IncompatibleModelError(
            "the VAE made latents that are no numbers, as SDXL's does in half precision; start ComfyUI with --fp32-vae "
            "or connect sdxl-vae-fp16-fix"
        )
    return latents
