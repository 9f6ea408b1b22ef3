"""The authors' two samplers, step by step: DDIM in LDM's spacing, and Euler in EDM's discretization."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import ConfigError

Predict = Callable[[Tensor, Tensor], Tensor]
"""Latents as the UNet sees them and timestep (batch,) -> noise, guided already."""


def ddim_timesteps(steps: int, timesteps: int = 1000) -> Tensor:
    """Training timesteps in LDM's spacing, descending, int64: every (timesteps // steps)-th one, plus 1.

    These are more than ``steps`` when that divides ``timesteps`` badly. Where the last would lie beyond the schedule,
    with 3 steps for instance, it is left out; there the authors' code fails.
    """
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"sampling needs between 1 and {timesteps} steps, got {steps}")
    spaced = torch.arange(0, timesteps, timesteps // steps) + 1
    return spaced[spaced < timesteps].flip(0)


def ddim(
    predict: Predict, latents: Tensor, alphas_cumprod: Tensor, timesteps: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latents and predicted clean latents after each DDIM step without noise (arXiv 2010.02502, eq. 12, σ = 0).

    Args:
        latents: standard normal noise, (batch, channels, height, width).
        alphas_cumprod: ᾱ of every training timestep, (timesteps,).
        timesteps: from ddim_timesteps; the last step ends at timestep 0, not at clean latents.
    """
    ends = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    for timestep, end in zip(timesteps.tolist(), ends.tolist()):
        alpha_bar, alpha_bar_end = alphas_cumprod[timestep].item(), alphas_cumprod[end].item()
        eps = predict(latents, torch.full((len(latents),), timestep, device=latents.device))
        clean = (latents - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        latents = alpha_bar_end**0.5 * clean + (1 - alpha_bar_end) ** 0.5 * eps
        yield latents, clean


def edm_sigmas(steps: int, *, sigma_min: float = 0.0292, sigma_max: float = 14.6146, rho: float = 3.0) -> Tensor:
    """Noise levels of arXiv 2206.00364, eq. 5, descending, with 0 at the end: (steps + 1,), float32.

    The defaults are the authors' for Stable Diffusion; the paper's ρ is 7.
    """
    if steps < 1 or not 0 < sigma_min <= sigma_max or rho <= 0:
        raise ConfigError(
            f"EDM noise levels need a step and 0 < sigma_min <= sigma_max, got {steps} steps from {sigma_max} to "
            f"{sigma_min} with rho {rho}"
        )
    ramp = torch.linspace(0, 1, steps)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1)])


def training_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """√((1-ᾱ)/ᾱ) of every training timestep, ascending, (timesteps,)."""
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def nearest_timestep(sigma: float, table: Tensor) -> int:
    """The training timestep whose noise level, of ``table`` from training_sigmas, is nearest to ``sigma``."""
    return int((table - sigma).abs().argmin())


def euler_edm(predict: Predict, noise: Tensor, sigmas: Tensor, table: Tensor) -> Iterator[Tensor]:
    """Yield the latents after each Euler step.

    The denoiser rounds the noise level to a training timestep's and takes the noise away at that level; the slope and
    the step are of the exact one (ldm/modules/diffusionmodules/denoiser.py, sampling.py in the authors' repository).

    Args:
        noise: standard normal, (batch, channels, height, width).
        sigmas: from edm_sigmas.
        table: from training_sigmas.
    """
    latents = noise * (1 + sigmas[0].item() ** 2) ** 0.5
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        timestep = nearest_timestep(sigma, table)
        rounded = table[timestep].item()
        eps = predict(latents / (rounded**2 + 1) ** 0.5, torch.full((len(latents),), timestep, device=latents.device))
        slope = rounded * eps / sigma  # (latents - denoised) / sigma
        latents = latents + (following - sigma) * slope
        yield latents
