"""A consistency model's one-step estimate of the final image: what training and guidance look ahead to."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..schedules import NoiseSchedule

PreviewType = Literal["epsilon", "v_prediction", "sample"]

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(timesteps: Tensor, *, timestep_scaling: float = TIMESTEP_SCALING) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, which make the estimate at t = 0 the sample itself.

    c_skip = σ² / (τ² + σ²) and c_out = τ / √(τ² + σ²), where τ is the scaled timestep and σ that of the data, 0.5
    (arXiv 2303.01469, section 3, with the timestep of arXiv 2310.04378 in place of the noise level).

    Args:
        timesteps: any shape, whole or fractional.

    Returns:
        Two tensors of the same shape, float32.
    """
    tau = timesteps.float() * timestep_scaling
    spread = tau**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / spread, tau / spread.sqrt()


def predict_original(
    schedule: NoiseSchedule,
    prediction: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    *,
    prediction_type: PreviewType | None = None,
) -> Tensor:
    """x_0 as the model's prediction implies it, in float32.

    Args:
        prediction, noisy: (batch, channels, height, width).
        timesteps: (batch,).
        prediction_type: what the model predicts; the schedule's own when left out.
    """
    prediction_type = prediction_type or schedule.prediction_type
    if prediction.shape != noisy.shape or timesteps.shape != noisy.shape[:1]:
        raise ConfigError(
            f"a preview needs one timestep for each sample and a prediction of the latents' shape, found timesteps "
            f"{tuple(timesteps.shape)}, prediction {tuple(prediction.shape)} and latents {tuple(noisy.shape)}"
        )
    prediction, noisy = prediction.float(), noisy.float()
    if prediction_type == "sample":
        return prediction
    alpha_bar = _per_sample(schedule.alphas_cumprod[timesteps.cpu()], noisy)
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction
    raise ConfigError(f"a preview takes epsilon, v_prediction or sample, not {prediction_type!r}")


def preview(
    schedule: NoiseSchedule,
    prediction: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    *,
    prediction_type: PreviewType | None = None,
    clip: float | None = None,
    timestep_scaling: float = TIMESTEP_SCALING,
) -> Tensor:
    """The consistency function f(x_t, t) = c_skip x_t + c_out x_0: final latents in one step, differentiable.

    Each sample has a timestep of its own. The division by √ᾱ_t multiplies rounding errors by up to 15, so the
    arithmetic is float32; the result has the dtype of ``noisy``.

    Args:
        prediction, noisy, timesteps, prediction_type: as for predict_original.
        clip: largest magnitude that x_0 may have; None leaves it, as latents want.
    """
    original = predict_original(schedule, prediction, noisy, timesteps, prediction_type=prediction_type)
    if clip is not None:
        original = original.clamp(-clip, clip)
    c_skip, c_out = boundary_scalings(timesteps, timestep_scaling=timestep_scaling)
    return (_per_sample(c_out, original) * original + _per_sample(c_skip, original) * noisy).to(noisy.dtype)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))
