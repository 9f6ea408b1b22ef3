"""Preview pictures while a concept is trained: local key locking on the left, global on the right."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from ...models.schedules import NoiseSchedule
from ..conditioning import Conditioning
from ..devices import autocast
from ..progress import Progress
from ..rank_one_edits import RankOneEdits
from ..sampling import decode_parked, guided, sample_latents
from ..vae import LATENT_CHANNELS, PIXELS_PER_LATENT, Autoencoder
from .config import PerfusionConfig


class Previews:
    """Samples the same prompt and noise again and again, so that pictures of different steps compare.

    Draws from a generator of its own: training takes the same course with and without previews.
    """

    def __init__(
        self,
        config: PerfusionConfig,
        unet: torch.nn.Module,
        edits: RankOneEdits,
        vae: Autoencoder | None,
        schedule: NoiseSchedule,
        conditioning: Callable[[], tuple[Conditioning, Conditioning, Tensor]],
        *,
        side: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Args:
        conditioning: returns that of the empty prompt, that of the preview prompt as trained so far, and the
            encoding of the preview prompt with the superclass word.
        """
        self.last: Image.Image | None = None
        self._config, self._unet, self._edits, self._vae = config, unet, edits, vae
        self._schedule, self._conditioning = schedule, conditioning
        self._side, self._device, self._progress = side, device, progress

    @torch.no_grad()
    def make(self, step: int) -> Image.Image | None:
        """Two pictures side by side with the weights as they are now; None when the user cancels meanwhile."""
        with autocast(self._config.precision, self._device):
            uncond, personalized, superclass = self._conditioning()
        keys = superclass
        if self._config.preview_guidance != 1:  # then the rows of the empty prompt are there, and come first
            keys = torch.cat([uncond.embeds, superclass.to(uncond.embeds)])
        predict = guided(self._unet, uncond, uncond, personalized, text_scale=self._config.preview_guidance)
        sampled = []
        try:
            for locked in (None, keys):
                self._edits.superclass = locked
                latents = self._sample(predict)
                if latents is None:
                    return None
                sampled.append(latents)
        finally:
            self._edits.superclass = None
        pictures = decode_parked(self._vae, torch.cat(sampled), self._device)
        self.last = Image.new("RGB", (2 * self._side, self._side))
        for number, picture in enumerate(pictures):
            self.last.paste(picture, (number * self._side, 0))
        return self.last

    def _sample(self, predict) -> Tensor | None:
        cells = self._side // PIXELS_PER_LATENT
        generator = torch.Generator().manual_seed(self._config.seed)
        noise = torch.randn(1, LATENT_CHANNELS, cells, cells, generator=generator).to(self._device)
        with autocast(self._config.precision, self._device):
            return sample_latents(self._schedule, predict, noise, self._config.preview_steps, self._progress.cancelled)
