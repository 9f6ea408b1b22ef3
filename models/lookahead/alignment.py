"""Faces brought to a standard position by five landmarks, differentiably."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DatasetError

CROP_SIZE = 112
Fit = Literal["direct", "inverse", "cp2tform", "authors"]

_AT_112 = [
    (38.29459953, 51.69630051),
    (72.53179932, 51.50139999),
    (56.02519989, 71.73660278),
    (41.54930115, 92.3655014),
    (70.72990036, 92.20410156),
]
REFERENCE_POINTS = torch.tensor(_AT_112, dtype=torch.float64) / CROP_SIZE
"""Eyes, nose tip and mouth corners as (x, y) in a crop of size 1, left to right as seen, (5, 2).

ArcFace's own template with the right eye one of 112 pixels further left, as the encoder's authors trained with.
"""


def widened(points: Tensor, factor: float = 1.3) -> Tensor:
    """Reference points for a crop that shows ``factor`` times as much around the face; 1.3 is the authors'."""
    return points / factor + (factor - 1) / (2 * factor)


def fit_similarity(source: Tensor, target: Tensor, how: Fit = "direct") -> Tensor:
    """Least-squares rotation, scale and shift that take each set of points to the target.

    They differ for points that do not match exactly:

    - ``direct`` minimises distances at the target, as insightface does, and never mirrors a face.
    - ``inverse`` fits the way back, from target to source, and inverts it. Either fit shrinks what does not match, so
      this one enlarges noisy faces more.
    - ``cp2tform`` makes the inverse fit and its mirrored twin and takes the one closer to the target, as Matlab does.
    - ``authors`` compares both with the *mirrored* target, an oversight in the encoder's authors' code. Their crops
      need it: it differs from ``cp2tform`` for one or two in a hundred noisy sets of landmarks.

    Args:
        source: (batch, points, 2).
        target: (points, 2) or (batch, points, 2).

    Returns:
        Transforms from source to target coordinates, (batch, 2, 3), float64, on the CPU.
    """
    source = source.cpu().double()
    target = target.cpu().double().expand_as(source)
    if not torch.isfinite(source).all() or (source == source[:, :1]).all((1, 2)).any():
        raise DatasetError("the landmarks of a face all lie on one point or are no numbers; give another picture of it")
    if how == "direct":
        return _fit(source, target)
    plain = invert(_fit(target, source))
    if how == "inverse":
        return plain
    if how not in ("cp2tform", "authors"):
        raise ConfigError(f"landmarks are fitted by direct, inverse, cp2tform or authors, not by {how!r}")
    mirror = torch.tensor([-1.0, 1.0], dtype=source.dtype)
    mirrored = invert(_fit(target * mirror, source)) * mirror[:, None]
    compared = target if how == "cp2tform" else target * mirror
    errors = [(transform_points(each, source) - compared).flatten(1).norm(dim=1) for each in (plain, mirrored)]
    return torch.where((errors[0] <= errors[1])[:, None, None], plain, mirrored)


def transform_points(transforms: Tensor, points: Tensor) -> Tensor:
    """Points (batch, points, 2) under transforms (batch, 2, 3)."""
    return points @ transforms[:, :, :2].mT + transforms[:, None, :, 2]


def invert(transforms: Tensor) -> Tensor:
    """The way back, (batch, 2, 3) -> (batch, 2, 3)."""
    linear = torch.linalg.inv(transforms[:, :, :2])
    return torch.cat([linear, -linear @ transforms[:, :, 2:]], dim=2)


def crop(images: Tensor, transforms: Tensor, size: int = CROP_SIZE) -> Tensor:
    """Bilinear crops, black outside the picture; gradients flow into the images.

    Args:
        images: (batch, channels, height, width).
        transforms: from pixels of the image, (x, y) with whole numbers at pixel centres, to those of the crop,
            (batch, 2, 3).

    Returns:
        (batch, channels, size, size) in the dtype of ``images``; positions and weights are float32.
    """
    if len(images) != len(transforms):
        raise ConfigError(
            f"every picture needs one transform, found {len(images)} pictures, {len(transforms)} transforms"
        )
    if not len(images):
        return images.new_zeros(0, images.shape[1], size, size) + images.sum()  # still part of the graph
    height, width = images.shape[-2:]
    steps = torch.arange(size, dtype=torch.float64)  # the grid is made on the CPU, as not every device has float64
    pixels = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(1, -1, 2)  # (1, size², xy)
    seen = transform_points(invert(transforms.cpu().double()), pixels.expand(len(images), -1, -1))
    extent = torch.tensor([width, height], dtype=torch.float64)
    grid = ((2 * seen + 1) / extent - 1).reshape(-1, size, size, 2)  # grid_sample's unit: the picture is [-1, 1]²
    sampled = F.grid_sample(images.float(), grid.float().to(images.device), padding_mode="zeros", align_corners=False)
    return sampled.to(images.dtype)


def align_faces(
    images: Tensor,
    landmarks: Sequence[Tensor | None],
    size: int = CROP_SIZE,
    *,
    reference_points: Tensor = REFERENCE_POINTS,
    how: Fit = "direct",
) -> tuple[Tensor, list[int]]:
    """Crop the face of each picture that has one.

    Args:
        images: (batch, channels, height, width).
        landmarks: (5, 2) in pixels of each picture; None where no face was found.
        reference_points: where the landmarks shall lie in a crop of size 1, (5, 2).
        how: as for fit_similarity.

    Returns:
        Crops (faces, channels, size, size) and the index of the picture that each was taken from. Without any face
        the crops are empty and still differentiable.
    """
    if len(images) != len(landmarks):
        raise ConfigError(
            f"every picture needs landmarks or None, found {len(images)} pictures, {len(landmarks)} entries"
        )
    found = [index for index, points in enumerate(landmarks) if points is not None]
    if not found:
        return crop(images[:0], torch.empty(0, 2, 3), size), found
    points = torch.stack([torch.as_tensor(landmarks[index]).cpu() for index in found])
    if points.shape[1:] != reference_points.shape:
        raise ConfigError(
            f"landmarks must be {tuple(reference_points.shape)} for each face, got {tuple(points.shape[1:])}"
        )
    return crop(images[found], fit_similarity(points, reference_points * size, how), size), found


def _fit(source: Tensor, target: Tensor) -> Tensor:
    centre, aim = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    p, q = source - centre, target - aim
    extent = p.square().sum((1, 2))
    cosine = (p * q).sum((1, 2)) / extent
    sine = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / extent
    linear = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # (batch, 2, 2)
    return torch.cat([linear, aim.mT - linear @ centre.mT], dim=2)
