"""Which timesteps to train on: the noisy ones, where identity is decided, more often."""

import torch
from torch import Tensor

from ..errors import ConfigError

DENOISING_ALPHA = 0.5
"""The authors' value for the denoising loss."""
PREVIEW_ALPHA = 0.2
"""The authors' value for the losses on the preview."""


def importance(max_timestep: int, alpha: float) -> Tensor:
    """p(t) ∝ 1 - α cos(π t / T) for t = 0 … T-1 (ReVersion, arXiv 2303.13495).

    Args:
        max_timestep: T; timesteps from there on are never drawn.
        alpha: 0 draws evenly; with 1 the cleanest timestep is never drawn.

    Returns:
        Probabilities, (max_timestep,), float64, which sum to 1.
    """
    if max_timestep < 1:
        raise ConfigError(f"the largest timestep must be at least 1, got {max_timestep}")
    if not -1 <= alpha <= 1 or (max_timestep == 1 and alpha == 1):
        raise ConfigError(f"importance alpha must lie between -1 and 1, got {alpha}, or no timestep has a probability")
    weights = 1 - alpha * torch.cos(torch.pi * torch.arange(max_timestep, dtype=torch.float64) / max_timestep)
    return weights / weights.sum()


def draw_timesteps(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Timesteps by inverting the distribution function.

    Args:
        probabilities: (timesteps,).
        uniform: independent draws from [0, 1), any shape; one draw gives one timestep, whatever the machine.

    Returns:
        Indices, the shape of ``uniform``, int64.
    """
    cumulative = probabilities.double().cumsum(0)
    timesteps = torch.searchsorted(cumulative / cumulative[-1], uniform.to(cumulative), right=True)
    return timesteps.clamp(max=len(probabilities) - 1)
