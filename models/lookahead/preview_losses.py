"""What a preview can be compared with: a picture, or the embedding of pictures, words or a face."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .preview_guidance import PreviewLoss

Distance = Literal["mean squared", "mean absolute"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as parts of the picture, 0 to 1."""


def fitted(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (batch, channels, ...) scaled until they cover height x width, and cropped in the middle."""
    factor = max(height / pictures.shape[-2], width / pictures.shape[-1])
    if factor != 1:
        size = [max(round(side * factor), least) for side, least in zip(pictures.shape[-2:], (height, width))]
        pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


def picture_loss(target: Tensor, distance: Distance = "mean squared", region: Tensor | None = None) -> PreviewLoss:
    """Distance from one picture, over all pixels or those of a region.

    Args:
        target: (3, height, width) in -1..1, any size.
        region: weights (height, width) in 0..1, any size; None is everywhere.
    """
    if region is not None and not (region > 0).any():
        raise ConfigError("the mask is black everywhere, so nothing of the picture would count; paint what should")
    if distance not in ("mean squared", "mean absolute"):
        raise ConfigError(f"pictures are compared by mean squared or mean absolute distance, not by {distance!r}")

    def loss(pictures: Tensor) -> Tensor:
        size = pictures.shape[-2:]
        difference = pictures.float() - fitted(target[None].to(pictures.device, torch.float32), *size)
        difference = difference.square() if distance == "mean squared" else difference.abs()
        if region is None:
            return difference.flatten(1).mean(1)
        weights = fitted(region[None, None].to(pictures.device, torch.float32), *size)
        # A region so small that scaling lost it still counts as one pixel.
        return (difference.mean(1) * weights[:, 0]).flatten(1).sum(1) / weights.sum().clamp_min(1)

    return loss


def embedding_loss(embed: Callable[[Tensor], Tensor], targets: Tensor) -> PreviewLoss:
    """1 - cosine of the angle to a target, averaged over targets: 0 when all point the same way, 2 at worst.

    Args:
        embed: pictures (batch, 3, height, width) in -1..1 -> embeddings (batch, dim).
        targets: (targets, dim).
    """

    def loss(pictures: Tensor) -> Tensor:
        embedded = F.normalize(embed(pictures).float(), dim=-1)
        directions = F.normalize(targets.to(embedded), dim=-1)
        return (1 - embedded @ directions.T).mean(1)

    return loss


def mean_loss(losses: Sequence[PreviewLoss]) -> PreviewLoss:
    """The mean of several losses."""
    return lambda pictures: torch.stack([loss(pictures) for loss in losses]).mean(0)


def clip_pixels(pictures: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures in -1..1 as a CLIP image tower wants them, (batch, 3, size, size), differentiable.

    The shorter side is scaled to ``size`` and the middle cropped. Colours are not rounded to 8 bits, which would leave
    no gradient.
    """
    height, width = pictures.shape[-2:]
    pictures = (pictures.float() + 1) / 2
    if (height, width) != (size, size):
        factor = size / min(height, width)
        pictures = F.interpolate(
            pictures, [max(round(side * factor), size) for side in (height, width)], mode="bicubic", antialias=True
        )
        top, left = (pictures.shape[-2] - size) // 2, (pictures.shape[-1] - size) // 2
        pictures = pictures[..., top : top + size, left : left + size]
    mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pictures - mean) / std


def square_around(mask: Tensor) -> Box:
    """The smallest square around the white part of a mask (height, width); no square where the edge is in the way.

    Raises ConfigError when nothing is white.
    """
    rows, columns = (mask > 0.5).any(1).nonzero(), (mask > 0.5).any(0).nonzero()
    if not len(rows):
        raise ConfigError("the mask is black everywhere; paint the place of the face white, or disconnect the mask")
    extent = torch.tensor([mask.shape[1], mask.shape[0]])
    first = torch.stack([columns[0, 0], rows[0, 0]]).cpu()
    last = torch.stack([columns[-1, 0], rows[-1, 0]]).cpu() + 1
    side = int((last - first).max())
    first = ((first + last - side).float() / 2).clamp_min(0).minimum((extent - side).clamp_min(0).float())
    last = (first + side).minimum(extent.float())
    return tuple(torch.cat([first / extent, last / extent]).tolist())


def cut_out(pictures: Tensor, box: Box, size: int) -> Tensor:
    """A box of each picture, scaled to size x size, differentiable."""
    height, width = pictures.shape[-2:]
    left, right = _between(box[0], box[2], width)
    top, bottom = _between(box[1], box[3], height)
    part = pictures[..., top:bottom, left:right].float()
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _between(start: float, stop: float, length: int) -> tuple[int, int]:
    first = min(round(start * length), length - 1)
    return first, max(round(stop * length), first + 1)
