"""One DCO training step on a diffusers UNet: the policy's prediction, the reference's, and the loss."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...models.dco import dco_loss
from ...models.denoising import denoising_error
from ...models.schedules import NoiseSchedule
from ..adapters import lora_off
from ..conditioning import Conditioning, predict
from ..ranks import Ranks
from .config import DCOConfig


def dco_step(
    unet: nn.Module,
    schedule: NoiseSchedule,
    config: DCOConfig,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    policy: Conditioning,
    reference: Conditioning | Tensor | None,
    class_rows: int = 0,
    autocast: AbstractContextManager | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Loss of one micro-batch, a scalar with gradient.

    The reference is the same UNet with its LoRA switched off. It sees the instance rows only: the class
    rows of prior preservation are trained with the plain loss (the authors' trainer also runs the
    reference on them and then mixes the halves up).

    Args:
        latents, noise: (batch, channels, height, width); the class rows, if any, come last.
        timesteps: (batch,); on the CPU, where the schedule is looked up, or on the UNet's device.
        policy: conditioning of all rows for the model being trained.
        reference: conditioning of at least the instance rows for the frozen base, or that base's prediction where
            it is known; None for the plain loss.
        class_rows: how many rows belong to class pictures.
    """
    instance_rows = len(latents) - class_rows
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    weights = None
    if config.snr_gamma:
        weights = schedule.min_snr_weights(timesteps[:instance_rows], config.snr_gamma)
    with autocast or nullcontext():
        base = reference if config.beta > 0 else None
        if isinstance(base, Conditioning):
            # Before the policy's pass, so that its adapters are on whenever the backward pass recomputes.
            first = slice(0, instance_rows)
            base = predict_base(unet, noisy[first], timesteps[first], base.first(instance_rows))
        prediction = predict(unet, noisy, timesteps.to(latents.device), policy)
    instance, instance_target = prediction[:instance_rows], target[:instance_rows]
    if base is None:
        loss = denoising_error(instance, instance_target, weights)
    else:
        average = ranks.mean if ranks is not None and ranks.count > 1 else None
        loss = dco_loss(instance, base, instance_target, config.beta, weights=weights, average_over_ranks=average)
    if class_rows:
        prior = denoising_error(prediction[instance_rows:], target[instance_rows:])
        loss = loss + config.prior_loss_weight * prior
    return loss


@torch.no_grad()
def predict_base(unet: nn.Module, noisy: Tensor, timesteps: Tensor, reference: Conditioning) -> Tensor:
    """The frozen base's prediction: the same UNet with its LoRA switched off."""
    with lora_off(unet):
        return predict(unet, noisy, timesteps.to(noisy.device), reference)
