"""Training of the small world's two text-to-image models on cached latents."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from autoencoder import NarrowAutoencoder
from dataset import Examples, for_encoder, in_unit_range, padded_ids
from PIL import Image
from torch import Tensor, nn
from training import Plan, device, fit, rank

from comfyui_personalize.models.schedules import NoiseSchedule
from comfyui_personalize.trainers.sampling import euler, sample
from comfyui_personalize.trainers.tokenizer import load_tokenizer
from models import TextToImage

DROPPED_CAPTIONS = 0.1
MIN_SNR = 5.0
CFG = 3.0
"""Guidance the models are meant for; the 7.5 of full-size models overshoots here."""
SHEET = 24


@torch.no_grad()
def cache_latents(examples: Examples, autoencoder: NarrowAutoencoder, path: Path, batch: int = 64) -> Tensor:
    """Latents (n, 4, 8, 8) of all pictures, computed once and kept in ``path``."""
    if not path.exists():
        batches = in_batches(len(examples), batch)
        latents = torch.cat([autoencoder.encode(in_unit_range(examples.pictures, chosen)) for chosen in batches])
        torch.save(latents, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    return torch.load(path, weights_only=True)


def in_batches(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


class Denoiser(nn.Module):
    """A model under training: token ids and noisy latents to the predicted noise."""

    def __init__(self, model: TextToImage):
        super().__init__()
        self.model = model
        self.unet, self.encoders = model.unet, model.encoders  # registered as modules

    def context(self, ids: Tensor, sizes: Tensor) -> dict:
        """Conditioning of the UNet.

        Args:
            ids: (batch, 77), padded with the end token.
            sizes: (batch, 6); unused by the SD1.5 kind.
        """
        hidden, pooled = self.model.encode([for_encoder(ids, slot) for slot in self.model.family.encoders])
        if pooled is None:
            return {"encoder_hidden_states": hidden}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}

    def forward(self, noisy: Tensor, timesteps: Tensor, context: dict) -> Tensor:
        return self.unet(noisy, timesteps, **context).sample


def train_text_to_image(
    denoiser: Denoiser, examples: Examples, latents: Tensor, autoencoder: NarrowAutoencoder, plan: Plan, work: Path
) -> None:
    """Train in place on all but the examples at the end that have no latents in use.

    Args:
        latents: (n, 4, 8, 8) of the first n examples.
    """
    name = denoiser.model.name
    schedule = NoiseSchedule.scaled_linear()
    tokenizer = load_tokenizer()
    empty = torch.tensor(padded_ids(tokenizer, ""))
    unseen = _Unseen(examples, tokenizer, first=len(latents))

    def loss_of(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (count,), generator=generator)
        which = torch.randint(examples.ids.shape[1], (count,), generator=generator)
        ids = examples.ids[chosen, which].long()
        dropped = torch.rand(count, generator=generator) < DROPPED_CAPTIONS
        ids = torch.where(dropped[:, None], empty, ids)
        timesteps = torch.randint(schedule.timesteps, (count,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        noisy = schedule.add_noise(latents[chosen], noise, timesteps)
        weights = schedule.min_snr_weights(timesteps, MIN_SNR)
        batch = (noisy, timesteps, ids, examples.sizes[chosen], noise, weights)
        noisy, timesteps, ids, sizes, noise, weights = (tensor.to(device()) for tensor in batch)
        predicted = denoiser(noisy, timesteps, denoiser.context(ids, sizes))
        error = (predicted - noise).square().mean((1, 2, 3))
        return (error * weights).mean()

    def look(step: int) -> str:
        pictures = sample_pictures(denoiser, autoencoder, unseen.ids, empty, seed=0)
        path = work / f"{name}_{step}.png"
        save_sheet(torch.cat([pictures, unseen.pictures]), path, columns=SHEET // 2)
        return f"samples above and drawn pictures below in {path}"

    fit(name, denoiser, plan, loss_of, work, look, look_every=500)
    if rank() == 0:
        torch.save(denoiser.state_dict(), work / f"{name}.weights.pt")


class _Unseen:
    """The first examples that are not trained on, with the longest of their captions."""

    def __init__(self, examples: Examples, tokenizer, first: int):
        ids = examples.ids[first : first + SHEET].long()
        lengths = (ids != tokenizer.eos_token_id).sum(-1)
        self.ids = ids[torch.arange(SHEET), lengths.argmax(-1)]
        self.pictures = in_unit_range(examples.pictures[first : first + SHEET])


@torch.no_grad()
def sample_pictures(
    denoiser: Denoiser, autoencoder: NarrowAutoencoder, ids: Tensor, empty: Tensor, seed: int, steps: int = 20
) -> Tensor:
    """Pictures (batch, 3, 64, 64) in 0..1 for captions' ids, by diffusers' Euler sampler."""
    count = len(ids)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(2 * count, -1)
    context = denoiser.context(torch.cat([ids, empty.expand(count, -1)]), sizes)

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        text, plain = denoiser(torch.cat([x, x]), timestep, context).chunk(2)
        return plain + CFG * (text - plain)

    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    *_, latents = sample(euler(NoiseSchedule.scaled_linear()), predict, noise, steps)
    return autoencoder.decode(latents).clamp(0, 1)


def save_sheet(pictures: Tensor, path: Path, columns: int, zoom: int = 2) -> None:
    """Pictures (n, 3, height, width) in 0..1 side by side; n is a multiple of ``columns``."""
    n, channels, height, width = pictures.shape
    grid = pictures.view(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels)
    image = Image.fromarray(np.rint(grid.numpy() * 255).astype(np.uint8))
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
