"""The noise schedule: identities, and agreement with diffusers' own."""

import pytest
import torch
from diffusers import DDPMScheduler

from comfyui_personalize.models.schedules import NoiseSchedule, offset_noise

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 6, 5, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("timesteps", [1000, 37])
def test_it_is_that_of_diffusers(batch, zero_terminal_snr, timesteps):
    latents, noise, at = batch
    at = at * (timesteps - 1) // 999
    ours = NoiseSchedule.scaled_linear(timesteps=timesteps, zero_terminal_snr=zero_terminal_snr)
    theirs = DDPMScheduler(timesteps, **SETTINGS, rescale_betas_zero_snr=zero_terminal_snr)
    # diffusers goes back to β and multiplies up again, which costs some digits.
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(ours.add_noise(latents, noise, at), theirs.add_noise(latents, noise, at))
    torch.testing.assert_close(ours.velocity(latents, noise, at), theirs.get_velocity(latents, noise, at))


def test_the_last_step_of_a_zero_terminal_schedule_is_pure_noise(batch):
    latents, noise, _ = batch
    schedule = NoiseSchedule.scaled_linear("v_prediction", zero_terminal_snr=True)
    last = torch.full((4,), schedule.timesteps - 1)
    torch.testing.assert_close(schedule.add_noise(latents, noise, last), noise)
    torch.testing.assert_close(schedule.velocity(latents, noise, last), -latents)
    plain = NoiseSchedule.scaled_linear()
    torch.testing.assert_close(schedule.alphas_cumprod[0], plain.alphas_cumprod[0])


def test_noisy_latents_and_velocity_are_a_rotation_of_latents_and_noise(batch):
    latents, noise, at = batch
    schedule = NoiseSchedule.scaled_linear()
    noisy, velocity = schedule.add_noise(latents, noise, at), schedule.velocity(latents, noise, at)
    torch.testing.assert_close(noisy**2 + velocity**2, latents**2 + noise**2, rtol=1e-4, atol=1e-5)
    signal = schedule.alphas_cumprod[at].sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(signal * noisy - (1 - signal**2).sqrt() * velocity, latents, rtol=1e-4, atol=1e-5)


def test_what_is_predicted(batch):
    latents, noise, at = batch
    schedule = NoiseSchedule.scaled_linear()
    assert schedule.target(latents, noise, at) is noise
    velocity = NoiseSchedule.scaled_linear("v_prediction")
    torch.testing.assert_close(velocity.target(latents, noise, at), schedule.velocity(latents, noise, at))


def test_half_precision_latents_stay_so(batch):
    latents, noise, at = batch
    schedule = NoiseSchedule.scaled_linear()
    half = schedule.add_noise(latents.bfloat16(), noise.bfloat16(), at)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), schedule.add_noise(latents, noise, at), rtol=0.03, atol=0.03)


def test_min_snr_weights():
    # ᾱ = 0.5 has SNR 1, ᾱ = 0.9 has SNR 9: weights min(SNR, 3)/SNR are 1 and 1/3; velocity adds 1.
    kept = torch.tensor([0.5, 0.9])
    at = torch.tensor([0, 1])
    torch.testing.assert_close(NoiseSchedule(kept).snr(at), torch.tensor([1.0, 9.0]))
    torch.testing.assert_close(NoiseSchedule(kept).min_snr_weights(at, 3.0), torch.tensor([1.0, 1 / 3]))
    velocity = NoiseSchedule(kept, "v_prediction")
    torch.testing.assert_close(velocity.min_snr_weights(at, 3.0), torch.tensor([2.0, 4 / 3]))


def test_min_snr_weights_of_pure_noise_are_finite():
    schedule = NoiseSchedule.scaled_linear("v_prediction", zero_terminal_snr=True)
    assert schedule.snr(torch.tensor([999])) == 0
    torch.testing.assert_close(schedule.min_snr_weights(torch.tensor([999]), 5.0), torch.tensor([2.0]))


def test_offset_noise_shifts_whole_channels(batch):
    _, noise, _ = batch
    offset = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    assert offset_noise(noise, offset, 0.0) is noise
    shift = offset_noise(noise, offset, 0.1) - noise
    torch.testing.assert_close(shift, (0.1 * offset).expand_as(noise), rtol=0, atol=1e-6)
