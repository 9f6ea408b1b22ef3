"""The Perfusion loss on the evaluation batch of a stopping rule."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...models.schedules import NoiseSchedule
from ..cache import LatentCache
from ..conditioning import Conditioning
from ..devices import autocast
from ..evaluation import EvaluationBatch
from .config import PerfusionConfig
from .prompts import Prompt, PromptDraws
from .step import perfusion_step


class FixedLoss:
    """The loss with the target input where training has left it; an evaluation does not move it."""

    def __init__(
        self,
        config: PerfusionConfig,
        unet: nn.Module,
        schedule: NoiseSchedule,
        prompts: PromptDraws,
        latents: LatentCache,
        conditioning: Callable[[Sequence[Prompt], Tensor | None], Conditioning],
        *,
        sized: bool,
        device: torch.device,
    ) -> None:
        """Args:
        conditioning: that of prompts as trained so far; the second argument is SDXL's sizes.
        sized: whether the UNet is told sizes, as SDXL's is.
        """
        self._config, self._unet, self._schedule, self._prompts = config, unet, schedule, prompts
        self._cache, self._conditioning, self._sized, self._device = latents, conditioning, sized, device

    def __call__(self, batch: EvaluationBatch) -> Tensor:
        time_ids = self._cache.time_ids(batch.pictures).to(self._device) if self._sized else None
        masks = self._cache.masks(batch.pictures) if self._config.masked_loss else None
        return perfusion_step(
            self._unet,
            self._schedule,
            latents=batch.latents.to(self._device),
            noise=batch.noise.to(self._device),
            timesteps=batch.timesteps,
            conditioning=self._conditioning(self._prompts.fixed(batch.captions), time_ids),
            masks=None if masks is None else masks.to(self._device),
            snr_gamma=self._config.snr_gamma,
            autocast=autocast(self._config.precision, self._device),
        )
