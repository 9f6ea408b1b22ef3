"""Pictures of the DCO workflows: a dog, a plant in a style, and both."""

from __future__ import annotations

from dataclasses import dataclass

from painting import ACCENT, INK, Canvas, photo, sticker


@dataclass(frozen=True)
class Coat:
    """Colours of a dog."""

    fur: str
    chest: str
    dark: str
    tongue: str


PHOTO = Coat("#d98a44", "#fbf4ea", "#33261f", "#e58a96")
FLAT = Coat("#6f86e8", "#eef0ff", "#2b2f77", "#ff7a66")


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
