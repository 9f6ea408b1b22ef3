"""The two halves of a training step: the denoising prediction, and the preview that looks ahead to the picture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.lookahead import Resampler, kept_tokens, preview
from ...models.lookahead.encoder_parts import last_block
from ...models.lookahead.losses import noise_loss, weighted_noise_loss
from ...models.schedules import NoiseSchedule
from ..conditioning import Conditioning
from .identity_attention import IdentityAttention, drop_tokens

Uniform = Callable[[str, int], Tensor]
"""Block and number of tokens -> as many draws from [0, 1), (tokens,), which decide what is dropped there."""


@dataclass(frozen=True)
class Rows:
    """A micro-batch, on the UNet's device."""

    latents: Tensor
    """Of the target pictures, scaled for the UNet, (batch, channels, height, width)."""
    noise: Tensor
    reference: Tensor
    """Latents of the encoder's pictures; they get the same noise."""
    prompt: Conditioning
    reference_prompt: Conditioning
    features: Tensor
    """CLIP-Vision's hidden states of the encoder's pictures, (batch, patches + 1, dim)."""
    nobody: Tensor
    """The same of the picture that stands for nobody, (1, patches + 1, dim)."""

    def first(self, count: int) -> "Rows":
        """The first ``count`` rows."""
        return Rows(
            self.latents[:count],
            self.noise[:count],
            self.reference[:count],
            self.prompt.first(count),
            self.reference_prompt.first(count),
            self.features[:count],
            self.nobody,
        )


class Denoised(NamedTuple):
    """What the UNet made of noisy latents."""

    noisy: Tensor
    prediction: Tensor
    tokens: Tensor
    """The adapter's, (batch, tokens, dim)."""


def denoise(
    identity: IdentityAttention,
    resampler: Resampler,
    schedule: NoiseSchedule,
    rows: Rows,
    timesteps: Tensor,
    *,
    uniform: Uniform | None = None,
    kv_drop_chance: float = 0.0,
    dropped: Tensor | None = None,
    noisy_reference: bool = True,
    adapter_scale: float = 1.0,
    preview_scale: float = 0.0,
    tell: Callable[[Tensor], Conditioning] | None = None,
) -> Denoised:
    """Encode the reference, and predict with its keys and values and the adapter's.

    Args:
        timesteps: (batch,), on the CPU or the UNet's device.
        uniform: draws for dropping the reference's tokens; None keeps all.
        kv_drop_chance: for each token of each block.
        dropped: rows whose adapter sees nobody, (batch,) of bool.
        noisy_reference: the encoder sees its picture as noisy as the target; else clean.
        preview_scale: strength of the LCM LoRA; 0 leaves it out.
        tell: gives the prompts in place of the rows' own, from features of the encoder's middle block, (batch,
            channels, height, width).
    """
    noisy = schedule.add_noise(rows.latents, rows.noise, timesteps)
    reference = schedule.add_noise(rows.reference, rows.noise, timesteps) if noisy_reference else rows.reference
    timesteps = timesteps.to(noisy.device)
    features = rows.features
    if dropped is not None and dropped.any():
        features = torch.where(dropped.to(features.device)[:, None, None], rows.nobody, features)
    tokens = resampler(features)
    middle: list[Tensor] | None = None if tell is None else []
    shared = identity.encode(reference, timesteps, rows.reference_prompt, middle=middle)
    if uniform is not None and kv_drop_chance:
        kept = {block: kept_tokens(uniform(block, k.shape[1]), kv_drop_chance) for block, (k, _) in shared.items()}
        shared = drop_tokens(shared, kept)
    prediction = identity.predict(
        noisy,
        timesteps,
        rows.prompt if tell is None else tell(middle[0]),
        adapter=identity.adapter(tokens),
        adapter_scale=adapter_scale,
        reference=shared,
        preview=preview_scale,
    )
    return Denoised(noisy, prediction, tokens)


def look_ahead(
    schedule: NoiseSchedule, denoised: Denoised, timesteps: Tensor, decode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Final latents in one step, and their pictures in -1..1; gradients flow through both.

    Args:
        denoised: predicted with the LCM LoRA.
        decode: from latents scaled for the UNet.
    """
    latents = preview(schedule, denoised.prediction, denoised.noisy, timesteps)
    return latents, decode(latents)


def noise_term(name: str, prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The denoising loss of that name; ``weights``, (batch,), are for ``weighted_noise``."""
    return noise_loss(prediction, target) if name == "noise" else weighted_noise_loss(prediction, target, weights)


def trained_parameters(
    identity: IdentityAttention, resampler: nn.Module
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The encoder's and the adapter's, by the names of the slim file; others that carry gradients lose them.

    The encoder's are its LoRA and the copies of keys and values, the adapter's the resampler and its projections. Of
    the last block only keys and values are read in the encoder's pass: a LoRA on it would never get a gradient.
    """
    last = f"lora.{last_block(identity.encoder.copies)}."
    groups: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
    for name, parameter in identity.parameters.items():
        if name.startswith(last):
            parameter.requires_grad_(False)
        else:
            groups[name.startswith("adapter.")][name] = parameter
    groups[1].update({f"resampler.{name}": one for name, one in resampler.requires_grad_(True).named_parameters()})
    return groups
