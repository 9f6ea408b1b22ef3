"""Properties of the fit to five landmarks and of the crop."""

import math

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, DatasetError
from comfyui_personalize.models.lookahead import (
    REFERENCE_POINTS,
    align_faces,
    crop,
    fit_similarity,
    transform_points,
    widened,
)

TARGET = REFERENCE_POINTS * 112


def similarity(scale, degrees, shift, *, mirror=False):
    cosine, sine = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    flip = -1 if mirror else 1
    rows = [[flip * cosine, -sine, shift[0]], [flip * sine, cosine, shift[1]]]
    return torch.tensor([rows], dtype=torch.float64)


def noisy_landmarks(count, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TARGET + spread * torch.randn(count, 5, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("how", ["direct", "inverse", "cp2tform", "authors"])
def test_an_exact_similarity_is_found(how):
    truth = torch.cat([similarity(0.4, 20, (300, 20)), similarity(2.5, -70, (-9, 4))])
    source = transform_points(torch.linalg.inv(square(truth))[:, :2], TARGET.expand(2, -1, -1))
    fitted = fit_similarity(source, TARGET, how)
    torch.testing.assert_close(fitted, truth)


def square(transforms):
    last = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64).expand(len(transforms), 1, 3)
    return torch.cat([transforms, last], dim=1)


def test_no_similarity_near_the_fit_is_closer():
    source = noisy_landmarks(1, 8)
    for how in ("direct", "inverse"):
        fitted = fit_similarity(source, TARGET, how)

        def error(transform, how=how):
            if how == "direct":
                return (transform_points(transform, source) - TARGET).square().sum()
            back = torch.linalg.inv(square(transform))[:, :2]
            return (transform_points(back, TARGET[None]) - source).square().sum()

        for angle, scale, shift in [(1, 1, (0, 0)), (0, 1.01, (0, 0)), (0, 1, (0.1, 0)), (0, 0.99, (0, -0.1))]:
            other = (square(similarity(scale, angle, shift)) @ square(fitted))[:, :2]
            assert error(other) > error(fitted)


def test_the_way_back_enlarges_noisy_landmarks_more():
    source = noisy_landmarks(20, 8)
    direct, back = (fit_similarity(source, TARGET, how)[:, :, :2].det() for how in ("direct", "inverse"))
    assert (back > direct).all()


def test_a_mirrored_face_is_mirrored_only_if_asked_for():
    truth = similarity(0.8, 15, (40, 30), mirror=True)
    source = transform_points(torch.linalg.inv(square(truth))[:, :2], TARGET[None])
    torch.testing.assert_close(fit_similarity(source, TARGET, "cp2tform"), truth)
    assert fit_similarity(source, TARGET)[0, :, :2].det() > 0


def test_the_mirrored_fit_is_taken_where_it_is_closer():
    source = noisy_landmarks(500, 30)
    errors = {
        how: (transform_points(fit_similarity(source, TARGET, how), source) - TARGET).flatten(1).norm(dim=1)
        for how in ("inverse", "cp2tform", "authors")
    }
    assert (errors["cp2tform"] <= errors["inverse"]).all() and (errors["cp2tform"] <= errors["authors"]).all()
    assert 0 < (errors["authors"] > errors["cp2tform"]).sum() < 100


def test_wider_reference_points_keep_the_centre():
    torch.testing.assert_close(
        widened(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 2), torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    )
    torch.testing.assert_close(widened(REFERENCE_POINTS, 1), REFERENCE_POINTS)


def test_the_identity_crops_the_corner():
    images = torch.rand(2, 3, 9, 12)
    cut = crop(images, torch.eye(2, 3).repeat(2, 1, 1), 7)
    torch.testing.assert_close(cut, images[:, :, :7, :7])


def test_a_shift_moves_whole_pixels_and_leaves_black_outside():
    images = torch.rand(1, 1, 5, 6)
    cut = crop(images, similarity(1, 0, (-2, 1)), 6)  # pixel (2, 0) of the picture comes to (0, 1)
    torch.testing.assert_close(cut[0, 0, 1:6, :4], images[0, 0, :, 2:])
    assert cut[0, 0, 0].abs().max() < 1e-5 and cut[0, 0, :, 4:].abs().max() < 1e-5


def test_landmarks_come_to_lie_on_the_reference_points():
    landmarks = transform_points(similarity(0.6, 25, (70, 20)), TARGET[None])[0].round()
    images = torch.zeros(1, 1, 160, 160)
    for x, y in landmarks.long():
        images[0, 0, y, x] = 1
    crops, found = align_faces(images, [landmarks])
    assert found == [0] and crops.shape == (1, 1, 112, 112)
    for x, y in TARGET.round().long():
        assert crops[0, 0, y - 2 : y + 3, x - 2 : x + 3].max() > 0.2
    assert (crops > 0.2).sum() < 60


def test_pictures_without_a_face_are_left_out_and_the_rest_keeps_its_order():
    images = torch.rand(4, 3, 40, 40, requires_grad=True)
    points = list(noisy_landmarks(4, 1) * 0.3)
    crops, found = align_faces(images, [points[0], None, points[2], points[3]], 24)
    assert found == [0, 2, 3]
    torch.testing.assert_close(crops[1:2], align_faces(images[2:3], [points[2]], 24)[0])
    crops.sum().backward()
    assert not images.grad[1].any() and all(images.grad[index].any() for index in found)


def test_without_any_face_the_graph_is_whole():
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    crops, found = align_faces(images, [None, None], 24)
    assert crops.shape == (0, 3, 24, 24) and found == []
    crops.sum().backward()
    assert not images.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pictures_are_sampled_in_float32(dtype):
    images = torch.rand(1, 3, 300, 300).to(dtype)
    landmarks = [transform_points(similarity(1.7, 8, (40, 30)), TARGET[None])[0]]
    half, _ = align_faces(images, landmarks)
    full, _ = align_faces(images.float(), landmarks)
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("points", [torch.full((5, 2), 7.0), torch.full((5, 2), math.nan)])
@pytest.mark.parametrize("how", ["direct", "inverse"])
def test_landmarks_on_one_point_are_refused(points, how):
    with pytest.raises(DatasetError, match="landmarks of a face"):
        align_faces(torch.rand(1, 3, 20, 20), [points], how=how)


def test_shapes_that_do_not_fit_are_refused():
    images = torch.rand(2, 3, 20, 20)
    with pytest.raises(ConfigError, match="2 pictures, 1 entries"):
        align_faces(images, [None])
    with pytest.raises(ConfigError, match="2 pictures, 1 transforms"):
        crop(images, torch.eye(2, 3)[None])
    with pytest.raises(ConfigError, match=r"\(5, 2\) for each face, got \(4, 2\)"):
        align_faces(images, [TARGET[:4], None])
    with pytest.raises(ConfigError, match="not by 'umeyama'"):
        fit_similarity(TARGET[None], TARGET, "umeyama")
