"""Pictures of the class that the base model draws itself, for prior preservation; kept for further trainings."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .base import TrainingBase
from .conditioning import Conditioning
from .dataset import Dataset
from .decoding import decode, read_bytes
from .devices import autocast, dtype_of, free_memory
from .pictures import Picture
from .progress import Cancelled, Progress
from .ranks import Ranks
from .sampling import euler, guided, sample, to_pictures
from .saved_pictures import save_png
from .text import PromptEmbeds, PromptEncoder
from .vae import LATENT_CHANNELS, PIXELS_PER_LATENT

GUIDANCE = 7.5
"""Classifier-free guidance scale, that of diffusers' own programs for such pictures."""


@dataclass(frozen=True)
class DrawnPicture(Picture):
    """A picture known by how it is drawn: it has its place in a dataset before there is a file."""

    def _image(self) -> Image.Image:
        return decode(read_bytes(self.path), self.path)


@dataclass(frozen=True)
class ClassPictures:
    """So many pictures of one prompt by one base model, in a folder named after all that decides them."""

    base: TrainingBase
    folder: Path
    """In which theirs is."""
    count: int
    prompt: str
    steps: int
    side: int
    """In pixels."""
    seed: int
    precision: str
    """Not ``auto``."""

    @property
    def paths(self) -> list[Path]:
        """A file for each picture; those of more pictures begin with the same ones."""
        sampling = [self.base.fingerprint, self.prompt, self.steps, GUIDANCE, self.side, self.seed, self.precision]
        digest = hashlib.sha256(json.dumps(sampling).encode()).hexdigest()[:12]
        words = re.sub(r"[^a-z0-9]+", "_", self.prompt.lower()).strip("_")[:40]
        return [self.folder / f"{words}_{digest}" / f"{index:05}.png" for index in range(self.count)]

    def added_to(self, dataset: Dataset) -> Dataset:
        """The dataset with these pictures as those of its class; they are to be drawn before they are looked at."""
        pictures = [
            DrawnPicture(f"{path.parent.name}/{path.name}", (self.side, self.side), path.name, path)
            for path in self.paths
        ]
        return dataset.with_class_pictures(pictures, self.prompt)

    def draw(self, device: torch.device, progress: Progress, ranks: Ranks, at_once: int = 1) -> None:
        """Draw those that are not there yet; the models have left the device afterwards.

        Every picture has a noise of its own, so that a cancelled work goes on where it was, and the processes of a
        training share it.

        Raises:
            Cancelled: in all processes, when the user cancelled.
            FormatError: the disk refuses.
        """
        # Of all, not of the missing ones: another process may have begun to draw its own.
        missing = [path for path in self.paths[ranks.index :: ranks.count] if not path.exists()]
        cancelled = False
        if missing:
            try:
                self._draw(missing, device, progress, at_once)
            except Cancelled:
                cancelled = True
            free_memory(device)
        if ranks.any(cancelled):
            raise Cancelled("cancelled while drawing pictures of the class")

    @torch.no_grad()
    def _draw(self, missing: list[Path], device: torch.device, progress: Progress, at_once: int) -> None:
        dtype = dtype_of(self.precision, device)
        progress.report(0, len(missing), "drawing pictures of the class")
        embeds = self._encoded(dtype, device)
        unet, vae = self.base.load_unet(dtype, device), self.base.load_vae(dtype, device)
        cells = self.side // PIXELS_PER_LATENT
        scheduler = euler(self.base.schedule)
        for first in range(0, len(missing), at_once):
            paths = missing[first : first + at_once]
            generators = [torch.Generator().manual_seed((self.seed + int(path.stem)) % 2**63) for path in paths]
            noise = torch.stack([torch.randn(LATENT_CHANNELS, cells, cells, generator=g) for g in generators])
            told = [self._told(embeds[[row] * len(paths)]) for row in (0, 1)]
            predict = guided(unet, told[0], told[0], told[1], text_scale=GUIDANCE)
            with autocast(self.precision, device):
                for latents in sample(scheduler, predict, noise.to(device), self.steps):  # noqa: B007
                    if progress.cancelled():
                        raise Cancelled
            for path, picture in zip(paths, to_pictures(vae.decode(latents)), strict=True):
                save_png(path, picture, {"prompt": self.prompt}, overwrite=True)
            done = first + len(paths)
            progress.report(done, len(missing), f"drawing pictures of the class: {done} of {len(missing)}", picture)

    def _encoded(self, dtype: torch.dtype, device: torch.device) -> PromptEmbeds:
        """Of the empty prompt and of the class's, on the device; the text encoders are gone."""
        encoders = self.base.load_text_encoders(dtype, device)
        encoder = PromptEncoder(self.base.family, encoders, self.base.tokenizer())
        return encoder.encode_frozen(["", self.prompt]).to(device)

    def _told(self, embeds: PromptEmbeds) -> Conditioning:
        sizes = None
        if self.base.family.size_conditioning:
            row = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=embeds.embeds.device)
            sizes = row.expand(len(embeds), -1)
        return Conditioning(embeds.embeds, embeds.pooled, sizes)
