"""The identity loss over faces found and missing, with its gradient."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_personalize.models.lookahead import REFERENCE_POINTS, fit_similarity, losses
from comfyui_personalize.models.lookahead.arcface import build_arcface
from comfyui_personalize.models.lookahead.losses import feature_loss, identity_loss

PAD = 200
"""The authors' landmarks are those of pictures with so many pixels around them."""


def scaled(height: int, width: int) -> torch.Tensor:
    """From pixels to -1..1 between the centres of the corner pixels, (1, 3, 3)."""
    return torch.tensor([[[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]]])


def rounded_faces(images, landmarks, size, *, how):
    """align_faces with the roundings of the authors' code, whose reference points and matrices are float32."""
    found = [index for index, points in enumerate(landmarks) if points is not None]
    points = torch.stack([landmarks[index] for index in found])
    transforms = fit_similarity(points, REFERENCE_POINTS.float() * size, how).float()
    matrices = torch.cat([transforms, torch.tensor([[[0.0, 0, 1]]]).expand(len(found), 1, 3)], dim=1)
    matrices = scaled(size, size) @ (matrices @ torch.inverse(scaled(*images.shape[-2:])))
    grid = F.affine_grid(torch.inverse(matrices)[:, :2], [len(found), 3, size, size], align_corners=True)
    return F.grid_sample(images[found], grid, align_corners=True), found


@pytest.mark.golden("lookahead", "12_*")
def test_identity(case, monkeypatch):
    weights = case.sibling(case.config["arcface_weights"].removesuffix(".safetensors")).weights
    network = build_arcface(weights, "tiny")

    def loss_and_gradient(name, pad=0):
        pictures = case.inputs["pred"].clone().requires_grad_()
        padded, targets = (F.pad(images, [pad] * 4) for images in (pictures, case.inputs["target"]))
        points, target_points = (case.inputs[f"landmarks_{which}"] - PAD + pad for which in ("pred", "target"))
        mine, theirs = (
            [one if use else None for one, use in zip(all_of, found)]
            for found, all_of in zip(case.inputs[f"found.{name}"], (points, target_points))
        )
        loss = identity_loss(network, padded, mine, targets, theirs, size=network.size, how="authors")
        return loss, torch.autograd.grad(loss, pictures)[0]

    for name in case.config["subsets"]:
        loss, gradient = loss_and_gradient(name)
        case.check(f"{name}.loss", loss.reshape(1))
        case.check(f"{name}.grad_norm", gradient.flatten(1).norm(dim=1))
    case.check("given_features.loss", feature_loss(case.inputs["features_b"], case.inputs["features_a"]).reshape(1))

    # The random network has kinks within a rounding error of its input, so single pixels need the same roundings.
    monkeypatch.setattr(losses, "align_faces", rounded_faces)
    for name in [name for name in case.config["subsets"] if f"{name}.grad" in case.expected]:
        case.check(f"{name}.grad", loss_and_gradient(name, PAD)[1])
