"""The random draws of a micro-batch: which pictures, which latents, noise and timesteps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.schedules import offset_noise
from .cache import LatentCache, LatentSample, stack_masks
from .config import TrainConfig
from .order import BatchOrder, Draw
from .ranks import Ranks


@dataclass(frozen=True)
class LatentBatch:
    """One micro-batch on the CPU; the rows of class pictures come after those of the examples."""

    draws: list[Draw]
    latents: Tensor
    """(rows, channels, height, width)."""
    noise: Tensor
    """Same shape."""
    timesteps: Tensor
    """(rows,)."""
    time_ids: Tensor
    """(rows, 6), SDXL's size conditioning."""
    masks: Tensor | None
    """(rows, 1, height, width), 1 where the picture counts; None when no picture has a mask."""
    prefixes: list[str]
    """What augmentations have the captions begin with, for every row."""


class LatentBatches:
    """Draws batches with one generator, alike on every rank; each rank keeps its own rows.

    So n processes see, together, exactly what one process with n times the batch would see.
    """

    def __init__(
        self,
        config: TrainConfig,
        order: BatchOrder,
        generator: torch.Generator,
        latents: LatentCache,
        class_latents: LatentCache | None,
        timesteps: int,
        ranks: Ranks,
    ) -> None:
        """Args: timesteps: of the noise schedule; they are drawn evenly."""
        self._offset, self._order, self._generator = config.offset_noise, order, generator
        self._latents, self._class_latents, self._timesteps = latents, class_latents, timesteps
        self._count = config.batch_size * ranks.count
        self._mine = slice(config.batch_size * ranks.index, config.batch_size * (ranks.index + 1))

    def next(self) -> LatentBatch:
        """The next micro-batch of this rank."""
        draws = self._order.next_batch(self._count, self._generator)
        parts = [self._rows(self._latents, [draw.example for draw in draws])]
        if self._class_latents is not None:
            parts.append(self._rows(self._class_latents, [draw.class_example for draw in draws]))
        samples: list[LatentSample] = [sample for part in parts for sample in part[0]]
        return LatentBatch(
            draws[self._mine],
            torch.stack([sample.latents for sample in samples]),
            torch.cat([noise for _, noise, _ in parts]),
            torch.cat([timesteps for _, _, timesteps in parts]),
            torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
            stack_masks(samples),
            [sample.prefix for sample in samples],
        )

    def _rows(self, cache: LatentCache, indices: list[int]) -> tuple[list[LatentSample], Tensor, Tensor]:
        samples = [cache.sample(index, self._generator) for index in indices]
        shape = (self._count, *samples[0].latents.shape)
        noise = torch.randn(shape, generator=self._generator)
        if self._offset:
            noise = offset_noise(noise, torch.randn(*shape[:2], 1, 1, generator=self._generator), self._offset)
        timesteps = torch.randint(0, self._timesteps, (self._count,), generator=self._generator)
        return samples[self._mine], noise[self._mine], timesteps[self._mine]
