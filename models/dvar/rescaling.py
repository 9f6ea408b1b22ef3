"""Random sizes for Custom Diffusion's pictures: small on a black ground, or enlarged and cut, and captioned so."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CELL = 8
"""Pixels per side of a latent cell."""
PREFIXES = {"small": ("a far away ", "very small "), "zoomed": ("zoomed in ", "close up ")}


@dataclass(frozen=True)
class Rescaled:
    """A square picture at a random size."""

    pixels: Tensor
    """(3, side, side), float32 in -1..1."""
    mask: Tensor
    """(side / 8, side / 8): 1 in the latent cells that show the picture, a margin of one cell left out."""
    prefix: str
    """What the caption begins with."""


def rescaled(picture: Image.Image, side: int, draw: Callable[[int, int], int]) -> Rescaled:
    """Draw a size and a place as the authors do (yandex-research/DVAR, data.py).

    Two times of three the picture is between a third of the side and all of it, else 1.2 to 1.4 times as large; from
    0.6 of the side up to all of it, it is shown as it is. Pictures that are not square are squeezed.

    Args:
        picture: RGB.
        side: in pixels, a multiple of 8.
        draw: a whole number from the first up to, not including, the second.
    """
    smaller = draw(0, 3) < 2
    size = draw(side // 3, side + 1) if smaller else draw(int(1.2 * side), int(1.4 * side))
    size += size % 2
    whole = torch.ones(side // CELL, side // CELL)
    if 0.6 * side <= size <= side:
        return Rescaled(_pixels(picture, side), whole, "")
    prefix = PREFIXES["zoomed" if size > side else "small"][draw(0, 2)]
    least, half = min(size, side) // 2, size // 2
    row, column = (draw(least, abs(size - side) + least + 1) for _ in range(2))
    if size > side:
        top, left = row - side // 2, column - side // 2
        return Rescaled(_pixels(picture, size)[:, top : top + side, left : left + side], whole, prefix)
    pixels, mask = torch.zeros(3, side, side), torch.zeros_like(whole)
    top, left = row - half, column - half
    pixels[:, top : top + size, left : left + size] = _pixels(picture, size)
    rows, columns = (slice(first // CELL + 1, (first + size) // CELL - 1) for first in (top, left))
    mask[rows, columns] = 1
    return Rescaled(pixels, mask, prefix)


def _pixels(picture: Image.Image, size: int) -> Tensor:
    array = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)
