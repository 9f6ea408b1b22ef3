"""Preview pictures while a training runs."""

from collections.abc import Callable

import torch
from PIL import Image

from .conditioning import Conditioning
from .config import TrainConfig
from .devices import autocast
from .progress import Progress
from .sampling import decode_parked, guided, sample_latents
from .vae import LATENT_CHANNELS, PIXELS_PER_LATENT, Autoencoder


class Previews:
    """Samples the same prompt and noise again and again, so that pictures of different steps compare.

    Draws from a generator of its own: training takes the same course with and without previews.
    """

    def __init__(
        self,
        config: TrainConfig,
        unet: torch.nn.Module,
        vae: Autoencoder | None,
        schedule,
        conditioning: Callable[[], tuple[Conditioning, Conditioning]],
        *,
        side: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Args: conditioning: returns that of the empty prompt and that of the preview prompt, as trained so far."""
        self.last: Image.Image | None = None
        self._config, self._unet, self._vae, self._schedule = config, unet, vae, schedule
        self._conditioning, self._side, self._device, self._progress = conditioning, side, device, progress

    @torch.no_grad()
    def make(self, step: int) -> Image.Image | None:
        """A picture with the weights as they are now; None when the user cancels meanwhile."""
        with autocast(self._config.precision, self._device):
            uncond, personalized = self._conditioning()
        cells = self._side // PIXELS_PER_LATENT
        generator = torch.Generator().manual_seed(self._config.seed)
        noise = torch.randn(1, LATENT_CHANNELS, cells, cells, generator=generator).to(self._device)
        predict = guided(self._unet, uncond, uncond, personalized, text_scale=self._config.preview_guidance)
        with autocast(self._config.precision, self._device):
            latents = sample_latents(
                self._schedule, predict, noise, self._config.preview_steps, self._progress.cancelled
            )
        if latents is None:
            return None
        (self.last,) = decode_parked(self._vae, latents, self._device)
        return self.last
