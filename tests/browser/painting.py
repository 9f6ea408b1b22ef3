"""What the pictures of the template browser are painted with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = (600, 400)  # of what is painted, in the middle of a square: the browser's cards are square
SIDE = 480
SCALE = 3  # drawn larger and reduced, for smooth edges
BACKGROUND = ("#222b38", "#161b24")
INK = "#e8ecf2"
ACCENT = "#f2b264"


class Canvas:
    """A transparent picture with coordinates in units of the finished one."""

    def __init__(self, width: float, height: float):
        self.image = Image.new("RGBA", (round(width * SCALE), round(height * SCALE)))
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: str, radius: float = 0) -> None:
        self._draw.rounded_rectangle(_scaled(left, top, right, bottom), radius * SCALE, fill)

    def disc(self, x: float, y: float, width: float, height: float | None = None, fill: str = INK) -> None:
        half, tall = width / 2, (height or width) / 2
        self._draw.ellipse(_scaled(x - half, y - tall, x + half, y + tall), fill)

    def shape(self, *points: tuple[float, float], fill: str) -> None:
        self._draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill)

    def curve(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        start: float,
        end: float,
        width: float,
        fill: str = ACCENT,
    ) -> None:
        self._draw.arc(_scaled(left, top, right, bottom), start, end, fill, round(width * SCALE))

    def text(self, x: float, y: float, words: str, size: float, fill: str = INK) -> None:
        self._draw.text((x * SCALE, y * SCALE), words, fill, ImageFont.load_default(size * SCALE), anchor="mm")

    def put(self, other: Canvas, x: float, y: float, angle: float = 0, size: float = 1) -> None:
        """Lay another canvas with its middle at (x, y)."""
        picture = other.image.resize([round(side * size) for side in other.image.size], Image.Resampling.LANCZOS)
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        corner = round(x * SCALE - picture.width / 2), round(y * SCALE - picture.height / 2)
        self.image.alpha_composite(picture, corner)


def _scaled(*numbers: float) -> tuple[int, ...]:
    return tuple(round(number * SCALE) for number in numbers)


def photo(backdrop: str, subject: Canvas | None = None) -> Canvas:
    """A print with a white margin, 160 by 180."""
    canvas = Canvas(160, 180)
    canvas.box(0, 0, 160, 180, "#f7f5f1", radius=6)
    canvas.box(10, 10, 150, 150, backdrop)
    if subject is not None:
        canvas.put(subject, 80, 86, size=0.62)
    return canvas


def sticker(picture: Canvas, border: int = 6) -> Canvas:
    """The picture with a white rim."""
    blurred = picture.image.getchannel("A").filter(ImageFilter.GaussianBlur(border * SCALE))
    mask = blurred.point(lambda alpha: 255 if alpha > 16 else 0)  # round corners, unlike a plain widening
    rimmed = Canvas(*(side / SCALE for side in picture.image.size))
    rimmed.image.paste("#ffffff", mask=mask.filter(ImageFilter.GaussianBlur(1)))
    rimmed.image.alpha_composite(picture.image)
    return rimmed


def save(paint: Callable[[Canvas], None], path: Path) -> None:
    """Paint one picture of SIZE and write it as a square."""
    canvas, painted = Canvas(SIZE[0], SIZE[0]), Canvas(*SIZE)
    top, bottom = (Image.new("RGBA", canvas.image.size, colour) for colour in BACKGROUND)
    canvas.image.paste(Image.composite(bottom, top, Image.linear_gradient("L").resize(canvas.image.size)))
    paint(painted)
    canvas.put(painted, SIZE[0] / 2, SIZE[0] / 2)
    picture = canvas.image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.save(path, quality=88, optimize=True)
