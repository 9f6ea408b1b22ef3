"""Training pictures, in files or in memory: known by their content, opened, and cut to the training size."""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.errors import DatasetError
from .decoding import decode, read_bytes, split_alpha

Crop = Literal["center", "random"]

MAX_ASPECT_DIFFERENCE = 0.02
"""How far the shape of a mask may be from its picture's; scaled copies differ by rounding."""


@dataclass(frozen=True)
class Cut:
    """One picture at the training size, and where in the picture it was taken."""

    pixels: Tensor
    """(3, height, width), float32 in -1..1."""
    mask: Tensor | None
    """(1, height, width), float32 in 0..1, 1 on the subject; None when the whole picture counts."""
    original_size: tuple[int, int]
    """(height, width) of the upright picture before resizing."""
    crop_top_left: tuple[int, int]
    """(top, left) of the cut in the resized, and if asked for flipped, picture."""


@dataclass(frozen=True)
class OpenPicture:
    """A decoded picture and its mask, from which any number of cuts are taken."""

    rgb: Image.Image
    mask: Image.Image | None = None

    def cut(
        self,
        size: int | tuple[int, int],
        *,
        crop: Crop = "center",
        flip: bool = False,
        generator: torch.Generator | None = None,
    ) -> Cut:
        """Resize until the picture just covers ``size``, then cut ``size`` out of it.

        The same arithmetic as torchvision's Resize (bilinear, antialiased) followed by CenterCrop or
        RandomCrop on 8-bit pictures, done in one resampling of the part that is kept, so that a picture
        of 1 x 5000 pixels needs no more memory than a square one.

        Args:
            size: side of a square, or (height, width), in pixels.
            crop: "center", or "random" for a position drawn from ``generator``.
            flip: mirror the cut left to right.
            generator: CPU generator, needed for random cuts.
        """
        height, width = (size, size) if isinstance(size, int) else size
        full_height, full_width = covering_size((self.rgb.height, self.rgb.width), (height, width))
        top, left = _place((full_height - height, full_width - width), crop, generator)
        part = (left / full_width, top / full_height, (left + width) / full_width, (top + height) / full_height)
        rgb = _to_tensor(_resample(self.rgb, part, (width, height))) * 2 - 1
        mask = None if self.mask is None else _to_tensor(_resample(self.mask, part, (width, height)))
        if flip:
            rgb, mask = rgb.flip(-1), None if mask is None else mask.flip(-1)
            left = full_width - width - left
        return Cut(rgb, mask, (self.rgb.height, self.rgb.width), (top, left))


@dataclass(frozen=True)
class Picture:
    """A picture in a file or in memory, known by its content; two are equal when their content is."""

    digest: str
    """SHA-256 of the file's bytes, or of the pixels of a picture in memory."""
    size: tuple[int, int]
    """(height, width), upright."""
    name: str = field(compare=False)
    """What messages call it."""
    path: Path | None = field(default=None, compare=False)
    pixels: np.ndarray | None = field(default=None, compare=False, repr=False)
    """(height, width, channels) in uint8, for pictures in memory."""

    @classmethod
    def from_file(cls, path: str | Path, *, as_mask: bool = False) -> Self:
        """Read and fully decode a file once, so that a damaged one is refused before training starts.

        Raises:
            DatasetError: the file is missing, empty, damaged, not a picture, or implausibly large.
        """
        path = Path(path).absolute()
        try:
            status = path.stat()
        except OSError as error:
            raise DatasetError(f"{path}: no such picture; correct the path or put the file there") from error
        digest, size = _inspect(path, status.st_size, status.st_mtime_ns, as_mask)
        return cls(digest, size, path.name, path=path)

    @classmethod
    def from_tensor(cls, tensor: Tensor, name: str, *, as_mask: bool = False) -> Self:
        """Keep a picture, (height, width) or (height, width, 1, 3 or 4), uint8 or float in 0..1, as 8-bit pixels.

        Eight bits make a picture train the same whether it comes through a file or from memory.
        """
        if tensor.ndim == 2:
            tensor = tensor.unsqueeze(-1)
        if tensor.ndim != 3 or tensor.shape[-1] not in (1, 3, 4) or tensor.numel() == 0:
            raise DatasetError(
                f"{name} has shape {tuple(tensor.shape)}; give (height, width, channels) with 1, 3 or 4 channels"
            )
        if tensor.dtype != torch.uint8:
            tensor = tensor.detach().float()
            if not torch.isfinite(tensor).all():
                raise DatasetError(f"{name} contains NaN or infinite values; check the nodes that made it")
            tensor = (tensor.clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = tensor.detach().cpu().contiguous().numpy().copy()
        digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        picture = cls(digest, pixels.shape[:2], name, pixels=pixels)
        if as_mask:
            picture.open_mask()
        else:
            picture.open()
        return picture

    def open(self) -> OpenPicture:
        """Decode to RGB; transparency is laid on white and handed on as the mask, opaque being 1."""
        return _lay_on_white(self._image(), self.name)

    def open_mask(self) -> Image.Image:
        """Decode as a mask of mode L: the transparency if there is any, else the brightness; white is the subject."""
        return _as_mask(self._image(), self.name)

    def _image(self) -> Image.Image:
        if self.pixels is not None:
            return Image.fromarray(self.pixels.squeeze(-1) if self.pixels.shape[-1] == 1 else self.pixels)
        data = read_bytes(self.path)
        if hashlib.sha256(data).hexdigest() != self.digest:
            _inspect.cache_clear()
            raise DatasetError(f"{self.path}: the file has changed since the dataset was read; run again")
        return decode(data, self.path)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) to resize ``size`` to so that it just covers ``target``, rounded down as torchvision does."""
    (height, width), (target_height, target_width) = size, target
    if width * target_height >= height * target_width:
        return target_height, max(target_width, int(target_height * width / height))
    return max(target_height, int(target_width * height / width)), target_width


def same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two (height, width) are the same up to scale, with a pixel of rounding forgiven on small pictures."""
    difference = abs(first[0] * second[1] - first[1] * second[0])
    return difference <= max(MAX_ASPECT_DIFFERENCE * first[0] * second[1], max(*first, *second))


def _place(room: tuple[int, int], crop: Crop, generator: torch.Generator | None) -> tuple[int, int]:
    if crop == "center":
        return round(room[0] / 2), round(room[1] / 2)
    if crop != "random":
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    if generator is None:
        raise ValueError("random crops need a generator")
    top, left = (int(torch.randint(space + 1, (), generator=generator)) for space in room)
    return top, left


def _resample(image: Image.Image, part: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    width, height = image.size
    scales = (width, height, width, height)
    box = tuple(min(fraction * length, length) for fraction, length in zip(part, scales))
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _to_tensor(image: Image.Image) -> Tensor:
    """(channels, height, width), float32 in 0..1."""
    array = np.array(image, dtype=np.float32)
    tensor = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    return tensor.contiguous() / 255


# Bounded, and keyed by what changes with the file, so that a queue of runs hashes and decodes each file once.
@lru_cache(maxsize=8192)
def _inspect(path: Path, length: int, modified_ns: int, as_mask: bool) -> tuple[str, tuple[int, int]]:
    data = read_bytes(path)
    image = decode(data, path)
    if as_mask:
        _as_mask(image, path.name)
    else:
        _lay_on_white(image, path.name)
    return hashlib.sha256(data).hexdigest(), (image.height, image.width)


def _lay_on_white(image: Image.Image, name: str) -> OpenPicture:
    rgb, alpha = split_alpha(image)
    if alpha is None:
        return OpenPicture(rgb)
    if alpha.getextrema()[1] == 0:
        raise DatasetError(f"{name}: the picture is fully transparent; remove its alpha channel or the picture")
    return OpenPicture(Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha), alpha)


def _as_mask(image: Image.Image, name: str) -> Image.Image:
    rgb, alpha = split_alpha(image)
    mask = rgb.convert("L") if alpha is None else alpha
    if mask.getextrema()[1] == 0:
        raise DatasetError(f"{name}: the mask is black everywhere; paint the subject white or remove the mask")
    return mask
