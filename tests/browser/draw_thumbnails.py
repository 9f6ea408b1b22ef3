"""Draw the pictures that the template browser shows beside the workflows: `python tests/browser/draw_thumbnails.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SIZE = (600, 400)  # of what is painted, in the middle of a square: the browser's cards are square
SIDE = 480
SCALE = 3  # drawn larger and reduced, for smooth edges
BACKGROUND = ("#222b38", "#161b24")
INK = "#e8ecf2"
ACCENT = "#f2b264"


@dataclass(frozen=True)
class Coat:
    """Colours of a dog."""

    fur: str
    chest: str
    dark: str
    tongue: str


PHOTO = Coat("#d98a44", "#fbf4ea", "#33261f", "#e58a96")
FLAT = Coat("#6f86e8", "#eef0ff", "#2b2f77", "#ff7a66")


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

    def curve(self, left: float, top: float, right: float, bottom: float, start: float, end: float, width: float):
        self._draw.arc(_scaled(left, top, right, bottom), start, end, ACCENT, round(width * SCALE))

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


def dog(coat: Coat) -> Canvas:
    """The head of a dog, 200 by 200."""
    canvas = Canvas(200, 200)
    for side in (-1, 1):
        canvas.shape((100 + side * 34, 62), (100 + side * 84, 12), (100 + side * 82, 96), fill=coat.fur)
        canvas.shape((100 + side * 52, 60), (100 + side * 75, 33), (100 + side * 73, 82), fill=coat.tongue)
    canvas.disc(100, 108, 158, 142, fill=coat.fur)
    canvas.disc(100, 146, 112, 84, fill=coat.chest)
    canvas.shape((88, 44), (112, 44), (124, 128), (76, 128), fill=coat.chest)
    for side in (-1, 1):
        canvas.disc(100 + side * 37, 98, 20, 22, fill=coat.dark)
        canvas.disc(100 + side * 37 + 4, 94, 6, fill="#ffffff")
    canvas.disc(100, 166, 36, 44, fill=coat.tongue)
    canvas.disc(100, 148, 62, 30, fill=coat.chest)
    canvas.disc(100, 128, 36, 26, fill=coat.dark)
    return canvas


def photo(backdrop: str, subject: Canvas | None = None) -> Canvas:
    """A print with a white margin, 160 by 180."""
    canvas = Canvas(160, 180)
    canvas.box(0, 0, 160, 180, "#f7f5f1", radius=6)
    canvas.box(10, 10, 150, 150, backdrop)
    if subject is not None:
        canvas.put(subject, 80, 86, size=0.62)
    return canvas


def plant() -> Canvas:
    """A flat illustration, 200 by 200."""
    canvas = Canvas(200, 200)
    canvas.disc(100, 96, 176, fill="#dfe3ff")
    canvas.disc(146, 52, 40, fill="#ff7a66")
    for side, height in ((-1, 20), (1, 44)):
        canvas.shape(
            (100, 150), (100 + side * 14, 74), (100 + side * 52, height), (100 + side * 48, 96), fill="#6f86e8"
        )
    canvas.shape((100, 150), (84, 66), (100, 14), (116, 66), fill="#8fa2ff")
    canvas.shape((66, 142), (134, 142), (122, 196), (78, 196), fill="#2b2f77")
    return canvas


def sticker(picture: Canvas, border: int = 6) -> Canvas:
    """The picture with a white rim."""
    blurred = picture.image.getchannel("A").filter(ImageFilter.GaussianBlur(border * SCALE))
    mask = blurred.point(lambda alpha: 255 if alpha > 16 else 0)  # round corners, unlike a plain widening
    rimmed = Canvas(*(side / SCALE for side in picture.image.size))
    rimmed.image.paste("#ffffff", mask=mask.filter(ImageFilter.GaussianBlur(1)))
    rimmed.image.alpha_composite(picture.image)
    return rimmed


def train_subject(canvas: Canvas) -> None:
    backdrops = ("#9cc3d8", "#c0472c", "#e6c7cf", "#7fa65c", "#8f9bb0")
    for place, backdrop in enumerate(backdrops):
        canvas.put(photo(backdrop, dog(PHOTO)), 110 + 95 * place, 170 + 9 * abs(place - 2), angle=12 - 6 * place)
    canvas.box(215, 300, 385, 356, ACCENT, radius=28)
    canvas.text(300, 327, "<dog>", 32, "#2a2018")


def train_style(canvas: Canvas) -> None:
    canvas.put(photo("#ffffff", plant()), 300, 160, angle=-4, size=1.3)
    for place, colour in enumerate(("#dfe3ff", "#8fa2ff", "#6f86e8", "#2b2f77", "#ff7a66")):
        canvas.disc(180 + 60 * place, 332, 44, fill=INK)
        canvas.disc(180 + 60 * place, 332, 38, fill=colour)


def reward_guidance(canvas: Canvas) -> None:
    player = Canvas(300, 260)
    player.put(dog(PHOTO), 120, 112)
    player.curve(150, 110, 240, 240, 0, 190, 22)
    player.shape((228, 175), (250, 175), (276, 104), (212, 104), fill=ACCENT)
    player.disc(244, 104, 64, 18, fill="#b9792f")
    player.box(112, 158, 160, 170, ACCENT, radius=6)
    player.box(150, 160, 172, 182, ACCENT, radius=6)
    canvas.put(sticker(player), 300, 146, size=0.98)
    for row, (name, amount) in enumerate((("text", 0.75), ("subject", 0.45))):
        y = 312 + 42 * row
        canvas.text(150, y, name, 20)
        canvas.box(210, y - 3, 480, y + 3, "#4a5568", radius=3)
        canvas.box(210, y - 3, 210 + 270 * amount, y + 3, ACCENT, radius=3)
        canvas.disc(210 + 270 * amount, y, 20)


def subject_in_style(canvas: Canvas) -> None:
    illustrated = Canvas(200, 200)
    illustrated.disc(100, 100, 196, fill="#dfe3ff")
    illustrated.put(dog(FLAT), 100, 104, size=0.82)
    prints = (photo("#9cc3d8", dog(PHOTO)), photo("#ffffff", plant()), photo("#ffffff", illustrated))
    for place, (picture, angle) in enumerate(zip(prints, (4, -3, 0))):
        canvas.put(picture, 106 + 194 * place, 200, angle=angle, size=0.98)
    canvas.text(203, 200, "+", 34, ACCENT)
    canvas.text(397, 200, "=", 34, ACCENT)


THUMBNAILS = {
    "dco_train_subject": train_subject,
    "dco_train_style": train_style,
    "dco_reward_guidance": reward_guidance,
    "dco_subject_in_style": subject_in_style,
}


def main() -> None:
    """Write all thumbnails."""
    for name, paint in THUMBNAILS.items():
        canvas, painted = Canvas(SIZE[0], SIZE[0]), Canvas(*SIZE)
        top, bottom = (Image.new("RGBA", canvas.image.size, colour) for colour in BACKGROUND)
        canvas.image.paste(Image.composite(bottom, top, Image.linear_gradient("L").resize(canvas.image.size)))
        paint(painted)
        canvas.put(painted, SIZE[0] / 2, SIZE[0] / 2)
        picture = canvas.image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(WORKFLOWS / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
