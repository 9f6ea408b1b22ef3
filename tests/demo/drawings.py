"""The demo's training pictures: one small toy in front of five backgrounds, drawn here, with their captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

TOKEN, WORD = "<toy>", "toy"
SIDE = 64
_SCALE = 4  # drawn larger and reduced, which smooths the edges
_ORANGE, _DARK, _BLUE, _WHITE = (240, 130, 30), (50, 30, 20), (30, 90, 220), (255, 255, 255)


@dataclass(frozen=True)
class Drawing:
    """One training picture; the base caption is the caption with the ordinary word in the token's place."""

    name: str
    picture: Image.Image
    caption: str

    @property
    def base_caption(self) -> str:
        return self.caption.replace(TOKEN, WORD)


def draw_all() -> list[Drawing]:
    """The training set, always the same; pictures of SIDE x SIDE pixels."""
    scenes = [
        ("meadow", _meadow, (32, 38, 19), f"a {TOKEN} on a green meadow under a light blue sky"),
        ("beach", _beach, (26, 40, 17), f"a {TOKEN} on a yellow beach in front of a blue sea"),
        ("night", _night, (36, 36, 18), f"a {TOKEN} on a dark hill at night, with white stars in the sky"),
        ("bricks", _bricks, (32, 36, 21), f"a {TOKEN} in front of a red brick wall with grey joints"),
        ("room", _room, (38, 34, 16), f"a {TOKEN} on a wooden table in a purple room"),
    ]
    return [Drawing(name, _draw(background, place), caption) for name, background, place, caption in scenes]


def write_folder(drawings: list[Drawing], folder: Path) -> Path:
    """The pictures as PNG with their captions in text files beside them, named in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, drawing in enumerate(drawings, start=1):
        path = folder / f"{number}_{drawing.name}.png"
        drawing.picture.save(path)
        path.with_suffix(".txt").write_text(drawing.caption, encoding="utf-8")
    return folder


def _draw(background: Callable[[_Scaled], None], place: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE))
    draw = _Scaled(image)
    background(draw)
    _toy(draw, *place)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


class _Scaled:
    """ImageDraw with coordinates in final pixels."""

    def __init__(self, image: Image.Image):
        self._draw = ImageDraw.Draw(image)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour) -> None:
        self._draw.rectangle([value * _SCALE for value in (x0, y0, x1, y1)], fill=colour)

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour) -> None:
        self._draw.ellipse([value * _SCALE for value in (x0, y0, x1, y1)], fill=colour)

    def shape(self, points: list[tuple[float, float]], colour) -> None:
        self._draw.polygon([(x * _SCALE, y * _SCALE) for x, y in points], fill=colour)


def _toy(draw: _Scaled, x: int, y: int, r: int) -> None:
    """An orange ball with two ears, a blue scarf and a face; (x, y) is its centre, r its radius."""
    for side in (-1, 1):
        ear = [
            (x + side * 0.35 * r, y - 0.8 * r),
            (x + side * 0.95 * r, y - 1.35 * r),
            (x + side * 0.95 * r, y - 0.3 * r),
        ]
        draw.shape(ear, _ORANGE)
    draw.oval(x - r, y - r, x + r, y + r, _ORANGE)
    draw.box(x - 0.9 * r, y + 0.38 * r, x + 0.9 * r, y + 0.68 * r, _BLUE)
    for side in (-1, 1):
        eye = x + side * 0.4 * r
        draw.oval(eye - 0.22 * r, y - 0.45 * r, eye + 0.22 * r, y - 0.01 * r, _WHITE)
        draw.oval(eye - 0.1 * r, y - 0.33 * r, eye + 0.1 * r, y - 0.11 * r, _DARK)


def _meadow(draw: _Scaled) -> None:
    draw.box(0, 0, 64, 36, (150, 205, 245))
    draw.box(0, 36, 64, 64, (70, 165, 60))
    draw.oval(46, 4, 58, 16, (255, 240, 140))


def _beach(draw: _Scaled) -> None:
    draw.box(0, 0, 64, 18, (185, 225, 250))
    draw.box(0, 18, 64, 34, (25, 105, 185))
    draw.box(0, 34, 64, 64, (240, 215, 130))


def _night(draw: _Scaled) -> None:
    draw.box(0, 0, 64, 64, (18, 20, 60))
    for x, y in ((6, 8), (16, 20), (24, 6), (44, 10), (57, 22), (60, 5), (8, 34)):
        draw.oval(x - 1, y - 1, x + 1, y + 1, _WHITE)
    draw.oval(-20, 44, 84, 110, (25, 50, 35))


def _bricks(draw: _Scaled) -> None:
    draw.box(0, 0, 64, 64, (165, 160, 155))
    for row in range(8):
        for column in range(-1, 5):
            x = column * 16 + (8 if row % 2 else 0)
            draw.box(x + 1, row * 8 + 1, x + 15, row * 8 + 7, (160, 50, 40))


def _room(draw: _Scaled) -> None:
    draw.box(0, 0, 64, 46, (130, 85, 170))
    draw.box(6, 6, 24, 24, (215, 200, 235))
    draw.box(0, 46, 64, 64, (140, 95, 50))
