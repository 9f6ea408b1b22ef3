"""The losses that the encoder learns from: on the predicted noise, and on the faces of the preview."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from .alignment import CROP_SIZE, Fit, align_faces

Landmarks = Sequence[Tensor | None]
"""(5, 2) in pixels of each picture, None where no face was found."""


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all values, (batch, channels, height, width) each; a scalar in float32."""
    return F.mse_loss(prediction.float(), target.float())


def weighted_noise_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The same with both sides of a row multiplied by its weight, (batch,), which so counts squared."""
    weights = weights.to(prediction.device).float().reshape(-1, *[1] * (prediction.ndim - 1))
    return F.mse_loss(prediction.float() * weights, target.float() * weights)


def feature_loss(features: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine, averaged over faces, of unit vectors (faces, dim)."""
    return (1 - (features * targets).sum(1)).mean()


def identity_loss(
    embed: Callable[[Tensor], Tensor],
    pictures: Tensor,
    landmarks: Landmarks,
    targets: Tensor,
    target_landmarks: Landmarks,
    *,
    size: int = CROP_SIZE,
    how: Fit = "direct",
) -> Tensor:
    """How far the faces of pictures are from those of their targets, over the rows where both have one.

    Where no row has, the loss is zero with a gradient of zeros, so that a backward pass still runs.

    Args:
        embed: aligned faces (faces, 3, size, size) in -1..1 -> unit vectors (faces, dim).
        pictures, targets: (batch, 3, height, width) in -1..1; heights and widths may differ between the two.
        how: the fit of the landmarks; see fit_similarity.
    """
    both = [mine is not None and theirs is not None for mine, theirs in zip(landmarks, target_landmarks, strict=True)]
    if not any(both):
        return (pictures * 0.0).mean()
    aligned = []
    for images, points in ((pictures, landmarks), (targets.detach(), target_landmarks)):
        shared = [one if use else None for one, use in zip(points, both, strict=True)]
        aligned.append(align_faces(images, shared, size, how=how)[0])
    faces, target_faces = aligned
    return feature_loss(embed(faces), embed(target_faces).detach())
