"""Personalization on the small world: our own trainers teach a base model, and pictures are drawn with what they left.

Nothing here knows how a method works: each entry of METHODS is a call of the trainer that users call, with settings
that suit so small a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scenes import SIDE
from torch import Tensor

from comfyui_personalize.trainers.adapters import set_lora, with_prefix_removed
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.dco.config import DCOConfig
from comfyui_personalize.trainers.dco.train import train
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.personalization import Personalization, PersonalizationSettings, open_personalization
from comfyui_personalize.trainers.sampling import Reward, euler, guided, rewarded, sample
from comfyui_personalize.trainers.text import PromptEncoder
from comfyui_personalize.trainers.vae import LATENT_CHANNELS, PIXELS_PER_LATENT

CPU = torch.device("cpu")

# Chosen on the tuning prompts. The published settings are for models a thousand times larger.
STEPS = 300
STATE_EVERY = 50
"""Steps between saved states; a training is lengthened from them, so lengths are multiples of this."""
BETA = 100.0
SETTINGS = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-2,  # one row of a text encoder that has seen a few hundred words
    "weight_decay": 0.0,
    "rank": 8,
    "resolution": SIDE,
    "crop": "center",
    "precision": "fp32",
    "checkpoint_every": STATE_EVERY,
    "checkpoint_limit": 1,
    "resume": True,
}
TEXT_SCALE = 3.0
SAMPLING_STEPS = 20


@dataclass(frozen=True)
class Job:
    """What is taught to which model, and for how long.

    A longer one goes on where a shorter one with the same output ended.
    """

    checkpoint: Path
    lesson: Path
    """Folder as subjects.write_lesson leaves it."""
    output: Path
    """Receives what is learned, and the training states."""
    steps: int = STEPS
    seed: int = 0


def dco(job: Job) -> Personalization:
    """LoRA and token with the DCO loss."""
    return _dco_recipe(job, "dco", BETA)


def dreambooth_lora(job: Job) -> Personalization:
    """LoRA and token with the plain loss: what the DCO authors compare with."""
    return _dco_recipe(job, "dreambooth_lora", 0.0)


METHODS: dict[str, Callable[[Job], Personalization]] = {"dreambooth_lora": dreambooth_lora, "dco": dco}


def _dco_recipe(job: Job, method: str, beta: float) -> Personalization:
    name = f"{method}_{job.lesson.name}_{job.seed}"
    place = OutputPlace(name, job.output / "loras", job.output / "embeddings", job.output / "runs" / name)
    base = open_base(job.checkpoint)
    config = DCOConfig(**SETTINGS, steps=job.steps, seed=job.seed, beta=beta)
    done = train(config, base, Dataset.from_folder(job.lesson), replace(place, overwrite=True), device=CPU)
    settings = PersonalizationSettings(path=done.files[0])
    return open_personalization(settings, base.family, layers_per_block=base.layers_per_block)


class Painter:
    """Draws pictures in batches with a base model and what it was taught.

    A picture is the one that the dco-sample recipe draws for its prompt and seed, but for rounding: that recipe draws
    them one by one, as large models need it.
    """

    def __init__(self, checkpoint: Path, taught: Sequence[Personalization] = ()):
        """Args: taught: at most a few, chained in this order; without any it is the base model that draws.

        Raises:
            ValueError: one of them changes a text encoder, which nothing here does yet.
        """
        base: TrainingBase = open_base(checkpoint)
        self._unet = base.load_unet()
        self._names = tuple(f"lora{number}" for number in range(len(taught)))
        for name, item in zip(self._names, taught):
            deltas = with_prefix_removed(item.deltas, "unet")
            if len(deltas) != len(item.deltas):
                raise ValueError(f"{item.name} changes a text encoder; teach the painter to attach it there")
            if deltas:
                set_lora(self._unet, deltas, adapter=name)
        encoders = base.load_text_encoders()
        tokens = [token for item in taught for token in item.tokens]
        rows = None
        if tokens:
            keys = [slot.key for slot in base.family.encoders]
            widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
            parts = [item.token_rows(dict(zip(keys, widths))) for item in taught if item.tokens]
            rows = {key: torch.cat([part[key] for part in parts]) for key in keys}
        self._prompts = PromptEncoder(base.family, encoders, base.tokenizer(), tokens, rows=rows)
        self._sized = base.family.size_conditioning
        self._vae, self._schedule = base.load_vae(), base.noise_schedule()

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        base_prompts: Sequence[str] | None = None,
        reward_scales: Sequence[float] = (),
        text_scale: float = TEXT_SCALE,
        steps: int = SAMPLING_STEPS,
    ) -> Tensor:
        """One picture for each prompt and seed, (n, 3, 64, 64) in 0..1.

        Args:
            prompts: with learned tokens.
            base_prompts: the same in ordinary words; needed for reward guidance.
            reward_scales: empty for plain guidance with everything that was taught switched on; one scale for
                reward guidance by all of it together; else a scale, and a prediction of its own, for each.
        """
        personalized = self._conditioning(prompts)
        uncond = self._conditioning([""] * len(prompts))
        if not reward_scales:
            predict = guided(self._unet, uncond, personalized, personalized, text_scale=text_scale)
        else:
            adapters = [()] if len(reward_scales) == 1 else [(name,) for name in self._names]
            rewards = [Reward(personalized, scale, names) for scale, names in zip(reward_scales, adapters, strict=True)]
            predict = rewarded(self._unet, uncond, self._conditioning(base_prompts), rewards, text_scale=text_scale)
        cells = (1, LATENT_CHANNELS, SIDE // PIXELS_PER_LATENT, SIDE // PIXELS_PER_LATENT)
        noise = torch.cat([torch.randn(cells, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        *_, latents = sample(euler(self._schedule), predict, noise, steps)
        return (self._vae.decode(latents) + 1) / 2

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        different = list(dict.fromkeys(prompts))
        encoded = self._prompts.encode_frozen(different)[[different.index(prompt) for prompt in prompts]]
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]).expand(len(prompts), -1) if self._sized else None
        return Conditioning(encoded.embeds, encoded.pooled, sizes)
