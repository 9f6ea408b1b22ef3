"""How the host's CLIP sees pictures, differentiably, and words in the same space."""

import torch
from torch import Tensor, nn

from ..models.errors import ConfigError, IncompatibleModelError
from ..models.lookahead.preview_losses import clip_pixels
from .differentiable import keeping_inputs


def embed_pictures(clip_vision, pictures: Tensor) -> Tensor:
    """CLIP's embeddings (batch, dim) of pictures (batch, 3, height, width) in -1..1, differentiable."""
    pixels = clip_pixels(pictures, clip_vision.image_size, clip_vision.image_mean, clip_vision.image_std)
    with keeping_inputs(clip_vision.model):
        embedded = clip_vision.model(pixel_values=pixels.to(clip_vision.load_device), intermediate_output=-2)[2]
    return embedded.float().to(pictures.device)


def image_width(clip_vision) -> int:
    """How many numbers describe a picture."""
    projection = getattr(clip_vision.model, "visual_projection", None)
    if isinstance(projection, nn.Module):
        return projection.weight.shape[0]
    raise IncompatibleModelError(
        "this CLIP Vision was not trained together with a text encoder; load a CLIP-ViT one, or connect an image and "
        "leave the text empty"
    )


def text_target(clip, text: str) -> Tensor:
    """CLIP's embedding of words in the space it shares with pictures, (1, dim).

    Raises:
        ConfigError: no CLIP is connected.
        IncompatibleModelError: the checkpoint came without the layer that leads into that space, as SD1.5's do.
    """
    if clip is None:
        raise ConfigError("a text needs a text encoder: connect clip, or leave the text empty")
    _, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    if pooled is None or not any(_projects(tower, pooled.shape[-1]) for tower in clip.cond_stage_model.modules()):
        raise IncompatibleModelError(
            "this CLIP was saved without its projection, so its words cannot be compared with pictures, as is usual "
            "for SD1.5; connect the CLIP of an SDXL or SD2.1 checkpoint, or connect an image instead of a text"
        )
    with torch.inference_mode(False):
        return pooled.clone().float()


def _projects(tower: nn.Module, width: int) -> bool:
    """Whether a text encoder of the host leads its pooled output through a trained projection of this width."""
    if not getattr(tower, "return_projected_pooled", False):
        return False
    projection = getattr(getattr(tower, "transformer", None), "text_projection", None)
    if projection is None or projection.weight.shape[0] != width:
        return False
    weight = projection.weight.float()
    # The host fills in the identity where a file has no projection.
    return not torch.equal(weight, torch.eye(width, device=weight.device))
