"""Properties of the one-step preview."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.lookahead import boundary_scalings, predict_original, preview
from comfyui_personalize.models.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
TIMESTEPS = torch.tensor([0, 20, 500, 999])


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def latents():
    return draws(4, 3, 5, 4)


@pytest.fixture
def noise():
    return draws(4, 3, 5, 4, seed=1)


def truth(kind, latents, noise):
    return {
        "epsilon": noise,
        "v_prediction": SCHEDULE.velocity(latents, noise, TIMESTEPS),
        "sample": latents,
    }[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_the_latents(kind, latents, noise):
    noisy = SCHEDULE.add_noise(latents, noise, TIMESTEPS)
    told = predict_original(SCHEDULE, truth(kind, latents, noise), noisy, TIMESTEPS, prediction_type=kind)
    torch.testing.assert_close(told, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_each_sample_has_its_own_timestep(kind, latents, noise):
    batch = preview(SCHEDULE, noise, latents, TIMESTEPS, prediction_type=kind)
    alone = [
        preview(SCHEDULE, noise[i : i + 1], latents[i : i + 1], TIMESTEPS[i : i + 1], prediction_type=kind)
        for i in range(4)
    ]
    torch.testing.assert_close(batch, torch.cat(alone))


def test_at_timestep_zero_the_preview_is_the_sample(latents, noise):
    assert torch.equal(preview(SCHEDULE, noise, latents, torch.zeros(4, dtype=torch.int64)), latents)


def test_far_from_zero_it_is_the_estimate(latents, noise):
    timesteps = torch.full((4,), 900)
    estimate = predict_original(SCHEDULE, noise, latents, timesteps)
    torch.testing.assert_close(preview(SCHEDULE, noise, latents, timesteps), estimate, rtol=1e-5, atol=1e-5)


def test_scalings_worked_out_by_hand():
    # τ = 0.5: c_skip = 0.25 / 0.5, c_out = 0.5 / √0.5; at every t they fulfil c_skip + c_out² = 1.
    c_skip, c_out = boundary_scalings(torch.tensor([0.0, 0.05]))
    torch.testing.assert_close(c_skip, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(c_out, torch.tensor([0.0, 0.5**0.5]))
    c_skip, c_out = boundary_scalings(TIMESTEPS)
    torch.testing.assert_close(c_skip + c_out**2, torch.ones(4))


def test_the_schedule_s_own_prediction_type_is_the_default(latents, noise):
    velocity = NoiseSchedule(SCHEDULE.alphas_cumprod, "v_prediction")
    expected = preview(SCHEDULE, noise, latents, TIMESTEPS, prediction_type="v_prediction")
    assert torch.equal(preview(velocity, noise, latents, TIMESTEPS), expected)


def test_clipping_limits_the_estimate(latents, noise):
    clipped = preview(SCHEDULE, noise, latents, torch.full((4,), 999), clip=0.8)
    assert clipped.abs().max() <= 0.8 + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, latents, noise):
    latents, noise = latents.to(dtype), noise.to(dtype)
    half = preview(SCHEDULE, noise, latents, TIMESTEPS)
    assert half.dtype == dtype
    assert torch.equal(half, preview(SCHEDULE, noise.float(), latents.float(), TIMESTEPS).to(dtype))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_gradients_are_finite(kind, latents, noise):
    prediction = noise.requires_grad_()
    preview(SCHEDULE, prediction, latents, TIMESTEPS, prediction_type=kind).square().sum().backward()
    assert torch.isfinite(prediction.grad).all() and prediction.grad[1:].abs().min() > 0


def test_shapes_and_types_that_do_not_fit_are_refused(latents, noise):
    with pytest.raises(ConfigError, match=r"timesteps \(3,\)"):
        preview(SCHEDULE, noise, latents, TIMESTEPS[:3])
    with pytest.raises(ConfigError, match=r"prediction \(2, 3, 5, 4\)"):
        preview(SCHEDULE, noise[:2], latents, TIMESTEPS)
    with pytest.raises(ConfigError, match="not 'flow'"):
        preview(SCHEDULE, noise, latents, TIMESTEPS, prediction_type="flow")
