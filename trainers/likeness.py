"""How alike sampled pictures are to the training pictures by CLIP: what the CLIP plateau looks at."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..models.schedules import NoiseSchedule
from ..models.similarity import mean_similarity
from .clip_vision import load_clip_vision
from .conditioning import Conditioning
from .config import TrainConfig
from .dataset import Dataset
from .devices import autocast
from .network_folders import CLIP_COLOURS, Preprocessing
from .plateau import PictureSettings
from .ranks import Ranks
from .sampling import decode_parked, guided, sample_latents
from .scoring import ClipJudge, load_clip_judge
from .vae import LATENT_CHANNELS, PIXELS_PER_LATENT, Autoencoder

AT_ONCE = 16
"""Pictures that CLIP sees at a time."""


def load_clip_for_pictures(path: Path) -> ClipJudge:
    """CLIP without its words, in float32 on the CPU, from a folder in transformers' layout or a CLIP-Vision file.

    Raises:
        FormatError: no complete CLIP is there.
    """
    if path.is_file():
        vision = load_clip_vision(path, torch.float32, "cpu").module
        side = vision.config.image_size
        return ClipJudge(path.name, vision, Preprocessing(side, (side, side), *CLIP_COLOURS), None)
    judge = load_clip_judge(path)
    del judge.network.text_model, judge.network.text_projection
    return judge


class Likeness:
    """CLIP similarity to the pictures of a dataset; between two questions the network waits on the CPU."""

    def __init__(self, path: Path, dataset: Dataset, device: torch.device) -> None:
        """Args: path: as for load_clip_for_pictures, whose errors it raises."""
        self._judge, self._device = load_clip_for_pictures(path), device
        pictures = (example.picture.open().rgb for example in dataset.examples)
        self._references = self._embed(pictures, len(dataset.examples))

    def __call__(self, pictures: Sequence[Image.Image]) -> float:
        """Mean cosine over all pairs of these pictures and the dataset's, in -1..1."""
        return float(mean_similarity(self._embed(iter(pictures), len(pictures)), self._references).mean())

    def _embed(self, pictures: Iterator[Image.Image], count: int) -> torch.Tensor:
        """Features of ``count`` pictures, (pictures, dim); they are asked for one after the other, and not kept."""
        self._judge.network.to(self._device)
        try:
            rows = [self._judge.embed_images(islice(pictures, AT_ONCE)) for _ in range(math.ceil(count / AT_ONCE))]
        finally:
            self._judge.network.to("cpu")
        return torch.cat(rows)


class PictureScore:
    """Samples the same prompts from the same noise at each check, and asks how alike the pictures are.

    Draws from a generator of its own: training takes the same course with and without checks. As many pictures are
    sampled at a time as a training step has rows, so that they need no more memory than it.
    """

    measure, higher_is_better = "clip", True

    def __init__(
        self,
        settings: PictureSettings,
        likeness: Likeness,
        prompts: Sequence[str],
        conditioning: Callable[[Sequence[str]], tuple[Conditioning, Conditioning]],
        *,
        config: TrainConfig,
        unet: nn.Module,
        vae: Autoencoder,
        schedule: NoiseSchedule,
        side: int,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """Args:
        prompts: one per picture, as PictureSettings.choose gives them.
        conditioning: of some of them: that of as many empty prompts, and that of the prompts as trained so far.
        vae: off the device between two checks.
        side: of the pictures, in pixels.
        """
        self._settings, self._likeness, self._prompts = settings, likeness, list(prompts)
        self._conditioning, self._config, self._unet = conditioning, config, unet
        self._vae, self._schedule, self._device, self._ranks = vae, schedule, device, ranks
        cells = side // PIXELS_PER_LATENT
        generator = torch.Generator().manual_seed(settings.seed)
        self._noise = torch.randn(len(self._prompts), LATENT_CHANNELS, cells, cells, generator=generator)

    @torch.no_grad()
    def run(self, cancelled: Callable[[], bool]) -> dict[str, float] | None:
        """The mean similarity of the weights as they are now; None when the user cancelled."""
        size, sampled = self._config.batch_size, []
        for first in range(0, len(self._prompts), size):
            with autocast(self._config.precision, self._device):
                uncond, personalized = self._conditioning(self._prompts[first : first + size])
                predict = guided(self._unet, uncond, uncond, personalized, text_scale=self._settings.guidance)
                noise = self._noise[first : first + size].to(self._device)
                latents = sample_latents(self._schedule, predict, noise, self._settings.steps, cancelled)
            if latents is None:
                return None
            sampled.append(latents)
        pictures = decode_parked(self._vae, torch.cat(sampled), self._device)
        likeness = torch.tensor(self._likeness(pictures), device=self._device)
        return {"": float(self._ranks.mean(likeness))}  # the same in all processes, which then stop together

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
