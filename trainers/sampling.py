"""Sampling pictures with a diffusers UNet: previews during training, and the command line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.dco import reward_guidance
from ..models.guidance import rescale_guidance, text_guidance
from ..models.schedules import NoiseSchedule
from .adapters import lora_off, only_adapters
from .conditioning import Conditioning, predict
from .vae import Autoencoder

Predict = Callable[[Tensor, Tensor], Tensor]
"""Model input (batch, channels, height, width) and timestep -> guided prediction."""


@dataclass(frozen=True)
class Reward:
    """One term of reward guidance: a personalized prompt, and how strongly its difference is followed."""

    conditioning: Conditioning
    scale: float
    adapters: tuple[str, ...] = ()
    """Names of the LoRAs that are on for it; empty leaves all on."""


def guided(
    unet: nn.Module,
    uncond: Conditioning,
    base: Conditioning,
    personalized: Conditioning,
    *,
    text_scale: float,
    reward_scale: float | None = None,
    rescale: float = 0.0,
) -> Predict:
    """Guided prediction: with a reward scale the authors' reward guidance, without one plain guidance.

    Plain guidance runs every row with the LoRA on, as any LoRA loader does. Reward guidance runs the
    unconditional and base rows with it off.
    """
    if reward_scale is not None:
        rewards = [Reward(personalized, reward_scale)]
        return rewarded(unet, uncond, base, rewards, text_scale=text_scale, rescale=rescale)

    def plain(x: Tensor, timestep: Tensor) -> Tensor:
        without, with_text = _text_rows(unet, x, timestep, uncond, personalized, text_scale)
        return rescale_guidance(text_guidance(without, with_text, text_scale), with_text, rescale)

    return plain


def rewarded(
    unet: nn.Module,
    uncond: Conditioning,
    base: Conditioning,
    rewards: Sequence[Reward],
    *,
    text_scale: float,
    rescale: float = 0.0,
) -> Predict:
    """Reward guidance with a term for each personalization; a term of scale 0 costs nothing."""
    rewards = [reward for reward in rewards if reward.scale]

    def predict_rewarded(x: Tensor, timestep: Tensor) -> Tensor:
        with lora_off(unet):
            without, with_text = _text_rows(unet, x, timestep, uncond, base, text_scale)
        learned = []
        for reward in rewards:
            with only_adapters(unet, reward.adapters) if reward.adapters else nullcontext():
                learned.append(predict(unet, x, timestep, reward.conditioning).float())
        scales = [reward.scale for reward in rewards]
        result = reward_guidance(without, with_text, learned, text_scale=text_scale, reward_scales=scales)
        return rescale_guidance(result, with_text, rescale)

    return predict_rewarded


def _text_rows(
    unet: nn.Module, x: Tensor, timestep: Tensor, uncond: Conditioning, text: Conditioning, text_scale: float
) -> tuple[Tensor | None, Tensor]:
    """Predictions without and with text; without text is None at scale 1, where it cancels.

    In float32, so that neither the guidance's sums nor the sampler's steps round to the model's precision.
    """
    if text_scale == 1:
        return None, predict(unet, x, timestep, text).float()
    return predict(unet, torch.cat([x, x]), timestep, Conditioning.join(uncond, text)).float().chunk(2)


@torch.no_grad()
def sample(scheduler: Any, predict_noise: Predict, latents: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the latents after every step of a diffusers scheduler.

    Args:
        scheduler: any diffusers scheduler.
        latents: standard normal noise, (batch, channels, height, width).
    """
    scheduler.set_timesteps(steps, device=latents.device)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = predict_noise(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        yield latents


def sample_latents(
    schedule: NoiseSchedule, predict_noise: Predict, noise: Tensor, steps: int, cancelled: Callable[[], bool]
) -> Tensor | None:
    """The latents at the end of sampling with Euler's method; None when ``cancelled``, asked at each step, says so."""
    for latents in sample(euler(schedule), predict_noise, noise, steps):  # noqa: B007
        if cancelled():
            return None
    return latents


def euler(schedule: NoiseSchedule) -> Any:
    """diffusers' Euler scheduler for a noise schedule of ours."""
    from diffusers import EulerDiscreteScheduler

    kept = schedule.alphas_cumprod.double()
    betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    # A schedule that ends in pure noise has an infinite last sigma, which the sampler cannot start from.
    betas = betas.clamp(max=0.999)
    return EulerDiscreteScheduler(
        num_train_timesteps=schedule.timesteps,
        trained_betas=betas.tolist(),
        prediction_type=schedule.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    )


def decode_parked(vae: Autoencoder, latents: Tensor, device: torch.device) -> list[Image.Image]:
    """Pictures of latents, one after the other, by an autoencoder that is on the device for as long only."""
    vae.to(device)
    try:
        return [to_pictures(vae.decode(one.unsqueeze(0)))[0] for one in latents]
    finally:
        vae.to("cpu")


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(batch, 3, height, width) in -1..1 -> pictures."""
    bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in bytes_]
