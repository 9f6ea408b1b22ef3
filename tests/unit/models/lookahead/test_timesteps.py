"""Properties of the distribution of timesteps."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.lookahead import draw_timesteps, importance


@pytest.mark.parametrize(("steps", "alpha"), [(1000, 0.5), (300, 0.2), (7, 1.0), (5, -0.5), (1, 0.5)])
def test_probabilities_sum_to_one(steps, alpha):
    probabilities = importance(steps, alpha)
    assert probabilities.shape == (steps,) and probabilities.min() >= 0
    assert probabilities.sum().item() == pytest.approx(1)


def test_noisy_timesteps_come_more_often():
    probabilities = importance(1000, 0.5)
    assert (probabilities.diff() > 0).all()
    assert (probabilities[-1] / probabilities[0]).item() == pytest.approx(3, rel=1e-4)  # 1.5 / 0.5


def test_alpha_zero_draws_evenly():
    torch.testing.assert_close(importance(8, 0.0), torch.full((8,), 1 / 8, dtype=torch.float64))


def test_a_draw_falls_where_the_distribution_function_passes_it():
    uniform = torch.tensor([[0.0, 0.24], [0.25, 0.9999]])
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25])
    assert draw_timesteps(probabilities, uniform).tolist() == [[0, 0], [2, 3]]
    assert draw_timesteps(probabilities, torch.ones(1)).tolist() == [3], "rounding of a draw never leaves the range"


def test_many_draws_follow_the_probabilities():
    probabilities = importance(10, 0.5)
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_timesteps(probabilities, uniform).bincount(minlength=10) / len(uniform)
    torch.testing.assert_close(drawn.double(), probabilities, atol=0.005, rtol=0)


@pytest.mark.parametrize(("steps", "alpha"), [(0, 0.5), (10, 1.5), (10, -1.5), (1, 1.0), (10, float("nan"))])
def test_settings_without_a_distribution_are_refused(steps, alpha):
    with pytest.raises(ConfigError, match="timestep"):
        importance(steps, alpha)
