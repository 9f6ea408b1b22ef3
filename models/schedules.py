"""The discrete noise schedule of latent diffusion: noising, velocity, signal-to-noise ratio."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t for t = 0 … T-1 and what the model predicts (DDPM, arXiv 2006.11239, eq. 4)."""

    alphas_cumprod: Tensor
    """ᾱ, shape (timesteps,), float32."""
    prediction_type: PredictionType = "epsilon"

    @classmethod
    def scaled_linear(
        cls,
        prediction_type: PredictionType = "epsilon",
        *,
        timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> "NoiseSchedule":
        """The schedule of every Stable Diffusion base: square roots of β spaced evenly.

        ``zero_terminal_snr`` shifts and scales √ᾱ so that the last timestep is pure noise
        (arXiv 2305.08891, algorithm 1); some v-prediction SDXL checkpoints are trained so.
        """
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float32) ** 2
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if zero_terminal_snr:
            root = alphas_cumprod.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
        return cls(alphas_cumprod, prediction_type)

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε; tensors (batch, channels, height, width), timesteps (batch,)."""
        alpha_bar = self.alphas_cumprod[timesteps.cpu()]
        return _per_sample(alpha_bar.sqrt(), latents) * latents + _per_sample((1 - alpha_bar).sqrt(), latents) * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (arXiv 2202.00512, appendix D); shapes as in add_noise."""
        alpha_bar = self.alphas_cumprod[timesteps.cpu()]
        return _per_sample(alpha_bar.sqrt(), latents) * noise - _per_sample((1 - alpha_bar).sqrt(), latents) * latents

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: the noise (any offset included) or the velocity."""
        return noise if self.prediction_type == "epsilon" else self.velocity(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """ᾱ_t / (1-ᾱ_t), shape (batch,)."""
        alpha_bar = self.alphas_cumprod[timesteps.cpu()]
        return (alpha_bar.sqrt() / (1 - alpha_bar).sqrt()) ** 2

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR-γ loss weights, shape (batch,), float32 (arXiv 2303.09556, section 3.4).

        min(SNR, γ)/SNR for noise. For velocity the authors of DCO, like the diffusers trainers,
        add one instead of dividing by SNR + 1.
        """
        # γ/SNR rather than min(SNR, γ)/SNR, which is 0/0 on the last step of a zero-terminal schedule.
        weights = (gamma / self.snr(timesteps)).clamp(max=1.0)
        return weights + 1 if self.prediction_type == "v_prediction" else weights


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise with a random shift per sample and channel, which lets solid colours be learned.

    Args:
        noise: (batch, channels, height, width).
        offset: standard normal draws, (batch, channels, 1, 1).
        strength: scale of the shift; 0 returns the noise unchanged.
    """
    return noise + strength * offset if strength else noise
