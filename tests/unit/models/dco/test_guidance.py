"""Properties of reward guidance."""

import pytest
import torch

from comfyui_personalize.models.dco import reward_guidance


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 6, 5, generator=generator) for _ in range(4)]


def test_reward_scale_zero_is_plain_guidance_of_the_base(predictions):
    uncond, base, personalized, _ = predictions
    guided = reward_guidance(uncond, base, [personalized], text_scale=7.5, reward_scales=[0.0])
    torch.testing.assert_close(guided, uncond + 7.5 * (base - uncond))


def test_a_personalization_that_changes_nothing_is_not_seen(predictions):
    uncond, base, *_ = predictions
    guided = reward_guidance(uncond, base, [base.clone()], text_scale=7.5, reward_scales=[3.0])
    torch.testing.assert_close(guided, uncond + 7.5 * (base - uncond))


def test_scales_of_one_give_the_personalized_prediction(predictions):
    uncond, base, personalized, _ = predictions
    guided = reward_guidance(uncond, base, [personalized], text_scale=1.0, reward_scales=[1.0])
    torch.testing.assert_close(guided, personalized)


def test_the_weights_sum_to_one(predictions):
    same = predictions[0]
    guided = reward_guidance(same, same, [same, same], text_scale=7.5, reward_scales=[3.0, -2.0])
    torch.testing.assert_close(guided, same)


def test_the_formula_commutes_with_a_change_of_parametrization(predictions):
    # Noise ε -> denoised (x - σε), affine with equal weights for all predictions.
    uncond, base, *personalized = predictions
    x, sigma = torch.randn(2, 4, 6, 5), 3.0
    scales = {"text_scale": 5.0, "reward_scales": [2.0, 1.5]}
    noise = reward_guidance(uncond, base, personalized, **scales)
    denoised = reward_guidance(x - sigma * uncond, x - sigma * base, [x - sigma * p for p in personalized], **scales)
    torch.testing.assert_close(denoised, x - sigma * noise, rtol=1e-4, atol=1e-4)


def test_numbers_worked_out_by_hand():
    # 1 + 2·(3 - 1) + 10·(4 - 3) + 100·(5 - 3) = 215
    one, three, four, five = (torch.full((1, 1, 1, 1), value) for value in (1.0, 3.0, 4.0, 5.0))
    guided = reward_guidance(one, three, [four, five], text_scale=2.0, reward_scales=[10.0, 100.0])
    assert guided.item() == pytest.approx(215.0)


def test_the_unconditional_prediction_cancels_at_text_scale_one(predictions):
    uncond, base, personalized, _ = predictions
    with_it = reward_guidance(uncond, base, [personalized], text_scale=1.0, reward_scales=[3.0])
    without = reward_guidance(None, base, [personalized], text_scale=1.0, reward_scales=[3.0])
    torch.testing.assert_close(with_it, without)


def test_one_scale_is_needed_for_each_personalization(predictions):
    uncond, base, *personalized = predictions
    with pytest.raises(ValueError, match="zip"):
        reward_guidance(uncond, base, personalized, text_scale=5.0, reward_scales=[1.0])
