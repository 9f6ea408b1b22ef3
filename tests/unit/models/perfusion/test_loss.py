"""Properties of the masked loss."""

import pytest
import torch

from comfyui_personalize.models.errors import DatasetError
from comfyui_personalize.models.perfusion import masked_loss, resize_mask, soft_mask


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_white_mask_is_no_mask():
    prediction, target = draws(2, 4, 3, 5), draws(2, 4, 3, 5, seed=1)
    assert torch.equal(masked_loss(prediction, target, torch.ones(2, 1, 3, 5)), masked_loss(prediction, target))


def test_the_mean_goes_over_all_pixels():
    # One of four pixels counts, with weight 0.5: (0.5 · 2)² / 4.
    mask = torch.tensor([[0.5, 0.0], [0.0, 0.0]]).reshape(1, 1, 2, 2)
    assert masked_loss(torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2), mask).item() == 0.25


def test_nothing_outside_the_mask_is_learned():
    prediction, mask = draws(2, 4, 3, 5).requires_grad_(), torch.zeros(2, 1, 3, 5)
    mask[:, :, 1, 2] = 1
    masked_loss(prediction, draws(2, 4, 3, 5, seed=1), mask).backward()
    assert torch.equal(prediction.grad != 0, mask.bool().expand(2, 4, 3, 5))


def test_half_precision_gives_a_float32_loss():
    loss = masked_loss(torch.full((1, 4, 2, 2), 300.0).half(), torch.zeros(1, 4, 2, 2).half(), torch.ones(1, 1, 2, 2))
    assert loss.dtype == torch.float32 and loss.item() == 90_000


def test_masks_keep_their_place_when_resized():
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., :8, :] = 1
    resized = resize_mask(mask, (4, 6))
    assert resized.shape == (1, 1, 4, 6)
    assert resized[..., :2, :].eq(1).all() and resized[..., 2:, :].eq(0).all()


def test_the_brightest_value_becomes_one():
    assert torch.equal(soft_mask(torch.tensor([0.0, 0.2, 0.4]), "dog.png"), torch.tensor([0.0, 0.5, 1.0]))
    assert soft_mask(torch.tensor([0, 128, 255], dtype=torch.uint8), "dog.png").max() == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 4), "dog.png: the mask is all black"),
        (torch.zeros(0, 4), "all black"),
        (torch.tensor([0.0, float("nan")]), "no numbers"),
        (torch.tensor([-1.0, 1.0]), "negative"),
        (torch.tensor([float("inf"), 1.0]), "no numbers"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message):
    with pytest.raises(DatasetError, match=message):
        soft_mask(mask, "dog.png")
