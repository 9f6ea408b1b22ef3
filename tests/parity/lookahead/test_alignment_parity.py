"""Faces brought to the authors' reference points: the fit, the crop and its gradient."""

import pytest
import torch

from comfyui_personalize.models.lookahead import REFERENCE_POINTS, align_faces, fit_similarity, widened


@pytest.mark.golden("lookahead", "11_face_alignment")
def test_alignment(case):
    config, images = case.config, case.inputs["images"].requires_grad_()
    points, found = case.inputs["landmarks"], case.inputs["found"].bool()
    # The authors pad every picture before they look for faces; ours stay as they are, with landmarks of their own.
    landmarks = [each - config["pad"] if face else None for each, face in zip(points, found)]
    size, larger = config["size"], widened(REFERENCE_POINTS, config["resize_factor"])

    crops, indices = align_faces(images, landmarks, size, how="authors")
    channels, rows, columns = (torch.arange(length) for length in crops.shape[1:])
    batch = torch.tensor(indices)
    wave = 0.1 * columns * (channels[:, None, None] + 1) + 0.07 * rows[:, None] * (
        batch[:, None, None, None] + 1
    )  # (faces, channels, rows, columns)
    (gradient,) = torch.autograd.grad((crops * wave.cos()).sum(), images)

    transforms = torch.eye(2, 3).repeat(len(images), 1, 1).double()  # where there is no face, the authors' stays this
    transforms[found] = fit_similarity(points[found], REFERENCE_POINTS * size, how="authors")
    case.check("transforms", transforms)
    case.check("crop", crops)
    case.check("image_grad", gradient)
    case.check("invalid_indices", torch.tensor([index for index in range(len(images)) if index not in indices]))
    case.check("reference_points", REFERENCE_POINTS)
    case.check("resized_reference_points", larger)
    head, _ = align_faces(images, landmarks, config["size2"], reference_points=larger, how="authors")
    case.check("crop_resized_refs", head)

    more, target = case.inputs["more_landmarks"], REFERENCE_POINTS * size
    for name, how in {"as_is": "authors", "matlab": "cp2tform", "nonreflective": "inverse"}.items():
        case.check(f"transforms_{name}", fit_similarity(more, target, how))
