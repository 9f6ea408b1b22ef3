"""Properties of the authors' samplers."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.perfusion import (
    ddim,
    ddim_timesteps,
    edm_sigmas,
    euler_edm,
    nearest_timestep,
    training_sigmas,
)
from comfyui_personalize.models.schedules import NoiseSchedule

KEPT = NoiseSchedule.scaled_linear().alphas_cumprod
TABLE = training_sigmas(KEPT)


@pytest.mark.parametrize(("steps", "count"), [(50, 50), (6, 7), (1, 1), (999, 999), (1000, 999)])
def test_the_number_of_timesteps(steps, count):
    timesteps = ddim_timesteps(steps)
    assert len(timesteps) == count
    assert timesteps[0] <= 999 and timesteps[-1] == 1


def test_a_timestep_beyond_the_schedule_is_left_out():
    assert ddim_timesteps(3).tolist() == [667, 334, 1]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="between 1 and 1000"):
        ddim_timesteps(steps)


@pytest.mark.parametrize("steps", [5, 20])
def test_ddim_finds_the_picture_when_the_noise_is_known(steps):
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    timesteps = ddim_timesteps(steps)
    start = NoiseSchedule(KEPT).add_noise(picture, noise, timesteps[:1].expand(2))
    states = list(ddim(lambda x, t: noise, start, KEPT, timesteps))
    assert len(states) == len(timesteps)
    for _, clean in states:
        torch.testing.assert_close(clean, picture, rtol=1e-4, atol=1e-4)
    end = NoiseSchedule(KEPT).add_noise(picture, noise, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(states[-1][0], end, rtol=1e-4, atol=1e-4)


def test_edm_levels_fall_from_the_first_to_the_last_and_to_zero():
    sigmas = edm_sigmas(8)
    assert sigmas.shape == (9,) and (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(14.6146, rel=1e-5)
    assert sigmas[-2].item() == pytest.approx(0.0292, rel=1e-4) and sigmas[-1] == 0
    assert edm_sigmas(1).tolist() == pytest.approx([14.6146, 0])


@pytest.mark.parametrize("settings", [{"sigma_min": 0.0}, {"sigma_min": 20.0}, {"rho": 0.0}, {"steps": 0}])
def test_impossible_levels_are_refused(settings):
    with pytest.raises(ConfigError, match="EDM noise levels need"):
        edm_sigmas(settings.pop("steps", 5), **settings)


def test_levels_of_training_are_their_own_nearest():
    assert (TABLE.diff() > 0).all()
    assert [nearest_timestep(TABLE[index].item(), TABLE) for index in (0, 500, 999)] == [0, 500, 999]
    assert nearest_timestep(100.0, TABLE) == 999


def test_euler_takes_the_known_noise_away():
    # Where each level is one of training's, nothing is rounded: x = picture + σ · noise all the way.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 3, 3, generator=generator)
    sigmas = torch.cat([TABLE[[900, 500, 100]], torch.zeros(1)])
    scale = (1 + sigmas[0] ** 2) ** 0.5
    states = list(euler_edm(lambda x, t: noise, noise, sigmas, TABLE))
    for sigma, state in zip(sigmas[1:], states, strict=True):
        torch.testing.assert_close(state, noise * (scale - sigmas[0] + sigma), rtol=1e-4, atol=1e-4)
