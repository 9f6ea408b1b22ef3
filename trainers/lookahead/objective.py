"""The loss of a batch, in the denoising half and looking ahead."""

import torch
from torch import Tensor

from ..devices import autocast
from .batch import Batch
from .config import LookaheadConfig
from .loading import Loaded
from .losses import Seen
from .step import Denoised, denoise, look_ahead, noise_term


class Objective:
    """What is trained for, with the models and settings of one training."""

    def __init__(self, config: LookaheadConfig, loaded: Loaded, device: torch.device):
        self._config, self._loaded, self._device = config, loaded, device

    def denoising(self, batch: Batch) -> Tensor:
        """The loss on the predicted noise, a scalar."""
        schedule = self._loaded.schedule
        prediction = self._denoise(batch, 0.0).prediction
        target = schedule.target(batch.rows.latents, batch.rows.noise, batch.timesteps)
        has_face = torch.tensor([float(points is not None) for points in batch.landmarks])
        return sum(
            term.weight * noise_term(term.name, prediction, target, has_face) for term in self._config.denoising_losses
        )

    def ahead(self, batch: Batch, strength: float = 1.0, *, faceless: float | None = None) -> Tensor:
        """The losses on the preview under the LCM LoRA at this strength, which scales them too; a scalar.

        Args:
            faceless: loss of a preview in which no face is found; None leaves such rows out.
        """
        loaded = self._loaded
        denoised = self._denoise(batch, strength)
        _, pictures = look_ahead(
            loaded.schedule, denoised, batch.timesteps, lambda latents: loaded.decoder.decode(latents, clamp=False)
        )
        seen = Seen(pictures, batch.references.to(self._device), batch.landmarks, batch.prompts, faceless)
        return strength * sum(weight * loss(seen) for weight, loss in loaded.losses.values())

    def _denoise(self, batch: Batch, strength: float) -> Denoised:
        config, loaded = self._config, self._loaded
        with autocast(config.precision, self._device):
            return denoise(
                loaded.identity,
                loaded.resampler,
                loaded.schedule,
                batch.rows,
                batch.timesteps,
                uniform=batch.uniform,
                kv_drop_chance=config.kv_drop_chance,
                dropped=batch.dropped,
                noisy_reference=config.noisy_reference,
                adapter_scale=config.adapter_scale,
                preview_scale=strength,
                tell=loaded.tell(batch.prompts),
            )
