"""Properties of the DCO loss."""

import math

import pytest
import torch

from comfyui_personalize.models.dco import dco_loss
from comfyui_personalize.models.denoising import denoising_error


def draws(*shape: int, count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_a_model_equal_to_its_base_costs_log_two():
    prediction, target = draws(3, 4, 5, 6, count=2)
    loss = dco_loss(prediction, prediction.clone(), target, beta=1000.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_the_loss_is_the_formula():
    # One pixel, batch 1: errors (3-1)² = 4 and (2-1)² = 1, so the loss is -log σ(-0.5·(4-1)) = log(1 + e^1.5).
    prediction, reference, target = (torch.full((1, 1, 1, 1), value) for value in (3.0, 2.0, 1.0))
    assert dco_loss(prediction, reference, target, beta=0.5).item() == pytest.approx(math.log1p(math.exp(1.5)))


def test_one_sigmoid_for_the_whole_batch():
    # Gains of the two samples: 4 - 0 = 4 and 0 - 4 = -4; their mean is 0, although neither sample's is.
    prediction = torch.tensor([2.0, 0.0]).reshape(2, 1, 1, 1)
    reference = torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)
    loss = dco_loss(prediction, reference, torch.zeros(2, 1, 1, 1), beta=10.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_the_gradient_leads_towards_the_target():
    prediction, reference, target = draws(2, 4, 5, 6)
    prediction.requires_grad_()
    loss = dco_loss(prediction, reference, target, beta=1.0)
    (gradient,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(gradient / gradient.norm(), (prediction - target) / (prediction - target).norm())
    assert dco_loss(prediction - 0.1 * gradient, reference, target, beta=1.0) < loss


def test_nothing_flows_into_the_reference():
    prediction, reference, target = (tensor.requires_grad_() for tensor in draws(2, 4, 5, 6))
    dco_loss(prediction, reference, target, beta=1.0).backward()
    assert reference.grad is None
    assert prediction.grad.abs().max() > 0


def test_a_model_far_better_than_its_base_no_longer_learns():
    _, reference, target = draws(2, 4, 5, 6)
    prediction = target.clone().requires_grad_()
    loss = dco_loss(prediction, reference, target, beta=1000.0)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0.0
    assert gradient.abs().max() == 0.0


@pytest.mark.parametrize("beta", [1.0, 1000.0, 1e6])
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_huge_differences_stay_finite(beta, offset):
    prediction, reference, target = draws(2, 4, 5, 6)
    prediction = (prediction + max(offset, 0)).requires_grad_()
    loss = dco_loss(prediction, reference + max(-offset, 0), target, beta=beta)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if offset > 0:  # -log σ(-x) -> x for a large x
        gain = denoising_error(prediction, target) - denoising_error(reference, target)
        assert loss.item() == pytest.approx(beta * gain.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_give_a_float32_loss(dtype):
    prediction, reference, target = (tensor.to(dtype) for tensor in draws(2, 4, 8, 8))
    loss = dco_loss(prediction, reference, target, beta=1000.0)
    assert loss.dtype == torch.float32
    # Rounded to bfloat16 anywhere on the way, the two errors would differ in the second digit.
    exact = dco_loss(prediction.double(), reference.double(), target.double(), beta=1000.0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


def test_weights_count_per_sample():
    prediction, target = draws(3, 4, 5, 6, count=2)
    weights = torch.tensor([0.5, 0.0, 2.0])
    each = [(prediction[i] - target[i]).square().mean() for i in range(3)]
    expected = (0.5 * each[0] + 2.0 * each[2]) / 3
    torch.testing.assert_close(denoising_error(prediction, target, weights), expected)
    torch.testing.assert_close(denoising_error(prediction, target, torch.ones(3)), denoising_error(prediction, target))


@pytest.mark.parametrize("weighted", [False, True])
def test_ranks_train_like_one_big_batch(weighted):
    prediction, reference, target = draws(6, 4, 5, 6)
    weights = torch.linspace(0.2, 1.7, 6) if weighted else None
    prediction.requires_grad_()
    whole = dco_loss(prediction, reference, target, beta=2.0, weights=weights)
    (expected,) = torch.autograd.grad(whole, prediction)

    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    of = [None if weights is None else weights[part] for part in parts]
    gains = [
        denoising_error(prediction[part], target[part], weight) - denoising_error(reference[part], target[part], weight)
        for part, weight in zip(parts, of, strict=True)
    ]
    mean = torch.stack(gains).mean().detach()
    for part, weight in zip(parts, of, strict=True):
        mine = prediction.detach()[part].requires_grad_()
        loss = dco_loss(
            mine, reference[part], target[part], beta=2.0, weights=weight, average_over_ranks=lambda _: mean
        )
        (gradient,) = torch.autograd.grad(loss, mine)
        torch.testing.assert_close(loss, whole)
        # Gradients are averaged over the ranks afterwards, hence the third.
        torch.testing.assert_close(gradient / len(parts), expected[part])
