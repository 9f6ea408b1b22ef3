"""The DCO loss on the evaluation batch of a stopping rule."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...models.schedules import NoiseSchedule
from ..cache import LatentCache
from ..dataset import Dataset
from ..devices import autocast
from ..evaluation import EvaluationBatch
from ..text_side import TextSide
from .config import DCOConfig
from .step import dco_step, predict_base


class FixedLoss:
    """The loss of the pictures without their class pictures.

    The frozen base's prediction does not change while the batch does not, so it is computed once: from then on an
    evaluation is one forward pass.
    """

    def __init__(
        self,
        config: DCOConfig,
        unet: nn.Module,
        schedule: NoiseSchedule,
        text: TextSide,
        dataset: Dataset,
        latents: LatentCache,
        *,
        sized: bool,
        device: torch.device,
    ) -> None:
        """Args: sized: whether the UNet is told sizes, as SDXL's is."""
        self._config, self._unet, self._schedule, self._text = config, unet, schedule, text
        self._dataset, self._cache, self._sized, self._device = dataset, latents, sized, device
        self._base: WeakKeyDictionary[EvaluationBatch, Tensor] = WeakKeyDictionary()

    def __call__(self, batch: EvaluationBatch) -> Tensor:
        examples = [self._dataset.examples[index] for index in batch.captions]
        time_ids = self._cache.time_ids(batch.pictures).to(self._device) if self._sized else None
        latents, noise = batch.latents.to(self._device), batch.noise.to(self._device)
        if self._config.beta > 0 and batch not in self._base:
            reference = self._text.reference([example.base_caption for example in examples], time_ids)
            noisy = self._schedule.add_noise(latents, noise, batch.timesteps)
            with autocast(self._config.precision, self._device):
                self._base[batch] = predict_base(self._unet, noisy, batch.timesteps, reference)
        with autocast(self._config.precision, self._device):
            policy = self._text.policy([example.caption for example in examples], time_ids)
        return dco_step(
            self._unet,
            self._schedule,
            self._config,
            latents=latents,
            noise=noise,
            timesteps=batch.timesteps,
            policy=policy,
            reference=self._base.get(batch),
            autocast=autocast(self._config.precision, self._device),
        )
