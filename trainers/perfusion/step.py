"""One Perfusion training step on a diffusers UNet: the edited prediction and the loss on the subject."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from ...models.perfusion import masked_loss
from ...models.schedules import NoiseSchedule
from ..conditioning import Conditioning, predict


def perfusion_step(
    unet: nn.Module,
    schedule: NoiseSchedule,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    masks: Tensor | None = None,
    snr_gamma: float = 0.0,
    autocast: AbstractContextManager | None = None,
) -> Tensor:
    """Loss of one micro-batch, a scalar with gradient to what edits the UNet.

    Args:
        latents, noise: (batch, channels, height, width).
        timesteps: (batch,); on the CPU, where the schedule is looked up, or on the UNet's device.
        conditioning: of the prompts with the word.
        masks: at the latents' size, (batch, 1, height, width); None counts every pixel.
        snr_gamma: of the min-SNR weights; 0 is off.
    """
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    with autocast or nullcontext():
        prediction = predict(unet, noisy, timesteps.to(latents.device), conditioning)
    if snr_gamma:
        # The mask multiplies prediction and target, so its square weighs the error.
        weights = schedule.min_snr_weights(timesteps, snr_gamma).to(latents.device).sqrt().view(-1, 1, 1, 1)
        masks = weights if masks is None else masks * weights
    return masked_loss(prediction, target, masks)
