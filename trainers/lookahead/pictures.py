"""Pictures on their way to the UNet: cut, encoded by the autoencoder and by CLIP-Vision, faces looked for."""

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.errors import DatasetError, TrainingError
from ...models.face_crops import cut_face
from ...models.faces import Face, FaceAnalyser
from ..clip_vision import ClipVision
from ..pictures import Crop, Picture
from ..vae import Autoencoder
from .data import FacePair, FacePicture, some_names

AUGMENTED_AREA = (0.8, 1.0)
"""Part of a reference that is kept where references are augmented."""

Cut = tuple[Tensor, tuple[Hashable, ...]]
"""A square of a picture, (3, side, side) in -1..1, and which one it is."""


@dataclass(frozen=True)
class Encoded:
    """A picture, on the CPU."""

    levels: Tensor
    """(3, side, side) in 0..255."""
    mean: Tensor
    """Of its latents, (channels, height, width), and their deviation."""
    std: Tensor
    features: Tensor | None = None
    """CLIP-Vision's hidden states, (patches + 1, dim); of references only."""
    landmarks: Tensor | None = None
    """Of its most certain face, (5, 2) in pixels; None without a face, or where nobody looked."""

    @property
    def pixels(self) -> Tensor:
        """(3, side, side) in -1..1."""
        return self.levels.float() / 127.5 - 1

    def latents(self, generator: torch.Generator) -> Tensor:
        """A draw from the posterior."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)

    @property
    def size(self) -> int:
        """Bytes."""
        parts = (self.levels, self.mean, self.std, self.features, self.landmarks)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class PictureReader:
    """Encodes pictures when they are met, and remembers as many as its memory holds."""

    def __init__(
        self,
        vae: Autoencoder,
        vision: ClipVision,
        *,
        side: int,
        crop: Crop,
        faces: FaceAnalyser | None,
        crop_heads: bool,
        memory: float,
    ):
        """Args:
        side: of the squares that are cut out.
        faces: looks for faces in references; None where nobody needs them.
        memory: in gigabytes.
        """
        self._vae, self._vision, self.side, self._crop = vae, vision, side, crop
        self._faces, self._crop_heads = faces, crop_heads
        self._room, self._known = int(memory * 2**30), OrderedDict()
        self.unreadable: dict[Path, str] = {}
        """Pictures that could not be opened so far, and why; each was warned of once."""
        self.nobody = vision.nobody()
        """Hidden states of the picture that stands for nobody, (1, patches + 1, dim)."""

    def target(self, picture: FacePicture, cut: Cut) -> Encoded:
        """The picture to be denoised."""
        pixels, key = cut
        return self._remembered(("target", *key), lambda: Encoded(*self._encode(pixels, picture.name)))

    def reference(self, pair: FacePair, cut: Cut, generator: torch.Generator) -> Encoded:
        """The picture that the encoder sees: its head where heads are cut out and one is found."""
        pixels, key = cut
        if pair.augment:
            pixels = augmented(pixels, generator)
            return self._look(pixels, pair.reference.name)
        return self._remembered(("reference", *key), lambda: self._look(pixels, pair.reference.name))

    def landmarks(self, pixels: Tensor) -> Tensor | None:
        """Of the most certain face in a picture (3, height, width), (5, 2); None without one."""
        face = self._face(pixels)
        return None if face is None else face.landmarks

    def remarks(self) -> list[str]:
        """Which pictures could not be read, as a sentence without its end; empty when all could."""
        if not self.unreadable:
            return []
        names = some_names([path.name for path in self.unreadable])
        return [f"{len(self.unreadable)} pictures could not be read and were left out ({names})"]

    def cut(self, picture: FacePicture, generator: torch.Generator, unreadable: dict[Path, str]) -> Cut:
        """Read a picture. Asks no network and changes nothing here, so that another thread may read.

        Args:
            unreadable: takes a picture that cannot be read, for ``leave_out``.

        Raises:
            DatasetError: it cannot be read.
        """
        known = self.unreadable.get(picture.path) or unreadable.get(picture.path)
        if known:
            raise DatasetError(known)
        try:
            opened = Picture.from_file(picture.path).open()
        except DatasetError as error:
            unreadable[picture.path] = str(error)
            raise
        cut = opened.cut(self.side, crop=self._crop, generator=generator)
        return cut.pixels, (picture.path, cut.crop_top_left)

    def leave_out(self, unreadable: Mapping[Path, str]) -> None:
        """Remember and warn of pictures that cannot be read, of each once."""
        for path, error in unreadable.items():
            if path not in self.unreadable:
                self.unreadable[path] = error
                warnings.warn(f"left out of the training: {error}", stacklevel=2)

    def _look(self, pixels: Tensor, name: str) -> Encoded:
        face = self._face(pixels)
        if face is not None and self._crop_heads:
            pixels = cut_face(pixels, face, self.side)
            face = self._face(pixels)
        encoded = self._encode(pixels, name)
        features = self._vision.hidden_states(pixels[None])[0]
        return Encoded(*encoded, features, None if face is None else face.landmarks)

    def _face(self, pixels: Tensor) -> Face | None:
        if self._faces is None:
            return None
        (found,) = self._faces.detect([pixels.detach().float().cpu()])
        return next((face for face in found if face.landmarks is not None), None)

    @torch.no_grad()
    def _encode(self, pixels: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        mean, std = (moment[0].float().cpu() for moment in self._vae.encode_moments(levels[None].float() / 127.5 - 1))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise TrainingError(f"{name}: the autoencoder returned values that are not numbers; choose another VAE")
        return levels, mean, std

    def _remembered(self, key: Hashable, make) -> Encoded:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        made = make()
        while self._known and self._room < made.size:
            _, oldest = self._known.popitem(last=False)
            self._room += oldest.size
        if made.size <= self._room:
            self._known[key] = made
            self._room -= made.size
        return made


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A square of at least four fifths of the picture, scaled to its size and mirrored every other time."""
    side = pixels.shape[-1]
    area, top, left, mirror = torch.rand(4, generator=generator).tolist()
    low, high = AUGMENTED_AREA
    kept = max(1, round(side * (low + (high - low) * area) ** 0.5))
    top, left = round(top * (side - kept)), round(left * (side - kept))
    part = pixels[None, :, top : top + kept, left : left + kept]
    scaled = F.interpolate(part, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    return scaled.flip(-1) if mirror < 0.5 else scaled
