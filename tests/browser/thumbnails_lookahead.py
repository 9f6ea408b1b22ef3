"""Pictures of the LCM-Lookahead workflows: one person, in several styles."""

from __future__ import annotations

from dataclasses import dataclass

from painting import ACCENT, INK, Canvas
from PIL import ImageFilter


@dataclass(frozen=True)
class Look:
    """Colours of a portrait."""

    backdrop: str
    skin: str
    shade: str
    hair: str
    dark: str
    lips: str
    clothes: str


PHOTO = Look("#9cc3d8", "#e9b78f", "#d39a70", "#5d3522", "#2b1c16", "#c8565c", "#2f7a74")
OIL = Look("#7c3b1d", "#f3b06b", "#d07f3c", "#a2441d", "#43160c", "#b02f2c", "#d9a441")
SKETCH = Look("#fbfaf6", "#f4f2ed", "#d6d3cc", "#8d8d8d", "#333333", "#a9a6a0", "#c4c2bc")
FLAT = Look("#dfe3ff", "#8fa2ff", "#6f86e8", "#2b2f77", "#2b2f77", "#ff7a66", "#ff7a66")
MARBLE = Look("#3d4a5e", "#e6e9ed", "#c9cfd7", "#d5dae0", "#8a93a0", "#bac1ca", "#c9cfd7")


def face(look: Look) -> Canvas:
    """Head and shoulders, 200 by 200."""
    canvas = Canvas(200, 200)
    canvas.disc(100, 26, 52, 46, fill=look.hair)
    canvas.disc(100, 88, 122, 124, fill=look.hair)
    canvas.box(22, 166, 178, 240, look.clothes, radius=46)
    canvas.box(83, 128, 117, 178, look.shade, radius=16)
    canvas.disc(100, 104, 94, 112, fill=look.skin)
    canvas.shape((50, 98), (58, 50), (100, 34), (142, 50), (150, 98), (132, 72), (112, 62), (76, 78), fill=look.hair)
    for side in (-1, 1):
        x = 100 + side * 22
        canvas.disc(x, 105, 9, 11, fill=look.dark)
        canvas.curve(x - 18, 87, x + 18, 123, 0, 360, 3.5, look.dark)
        canvas.box(x - 11, 80, x + 11, 84, look.dark, radius=2)
    canvas.curve(93, 98, 107, 112, 200, 340, 3.5, look.dark)
    canvas.shape((97, 112), (104, 128), (94, 128), fill=look.shade)
    canvas.curve(84, 118, 116, 146, 30, 150, 5, look.lips)
    return canvas


def portrait(look: Look, picture: Canvas | None = None) -> Canvas:
    """A print with a white margin, 160 by 180; of the face, or of another picture of it."""
    canvas = Canvas(160, 180)
    canvas.box(0, 0, 160, 180, "#f7f5f1", radius=6)
    canvas.box(10, 10, 150, 150, look.backdrop)
    canvas.put(picture or face(look), 80, 80, size=0.7)
    return canvas


def framed(look: Look) -> Canvas:
    """A painting in a frame, 220 by 250."""
    canvas = Canvas(220, 250)
    canvas.box(0, 0, 220, 250, "#8a5a22", radius=4)
    canvas.box(6, 6, 214, 244, ACCENT, radius=3)
    canvas.box(20, 20, 200, 230, "#8a5a22")
    canvas.box(23, 23, 197, 227, look.backdrop)
    sitter = Canvas(174, 204)
    sitter.put(face(look), 87, 112, size=0.92)
    canvas.put(sitter, 110, 125)
    return canvas


def arrow(canvas: Canvas, x: float, y: float) -> None:
    canvas.box(x - 22, y - 4, x + 8, y + 4, ACCENT, radius=4)
    canvas.shape((x + 4, y - 14), (x + 24, y), (x + 4, y + 14), fill=ACCENT)


def face_to_portrait(canvas: Canvas) -> None:
    canvas.put(portrait(PHOTO), 130, 205, angle=4, size=1.2)
    arrow(canvas, 282, 200)
    canvas.put(framed(OIL), 452, 200, size=1.12)


def fast_portrait(canvas: Canvas) -> None:
    canvas.put(portrait(PHOTO), 120, 200, angle=4, size=1.1)
    canvas.put(portrait(FLAT), 472, 200, angle=-4, size=1.3)
    bolt = ((306, 130), (258, 212), (290, 212), (268, 276), (330, 184), (294, 184), (322, 130))
    canvas.shape(*bolt, fill=ACCENT)


def few_steps(canvas: Canvas) -> None:
    for place, (x, blur) in enumerate(((73, 16), (205, 8), (351, 3), (509, 0))):
        picture, size = face(OIL), 0.6 + 0.08 * place
        picture.image = picture.image.filter(ImageFilter.GaussianBlur(blur * picture.image.width / 200))
        canvas.put(portrait(OIL, picture), x, 260 - 90 * size, size=size)
    for step in range(6):
        canvas.disc(200 + 40 * step, 316, 22, fill=ACCENT)


def style_grid(canvas: Canvas) -> None:
    canvas.put(portrait(PHOTO), 112, 200, angle=4, size=1.1)
    arrow(canvas, 244, 200)
    for place, look in enumerate((OIL, SKETCH, MARBLE, FLAT)):
        canvas.put(portrait(look), 356 + 152 * (place % 2), 116 + 168 * (place // 2), size=0.85)


def saved_identity(canvas: Canvas) -> None:
    card = Canvas(240, 150)
    card.box(0, 0, 240, 150, "#f7f5f1", radius=14)
    card.box(16, 16, 116, 134, PHOTO.backdrop, radius=6)
    photo = Canvas(100, 118)
    photo.put(face(PHOTO), 50, 62, size=0.58)
    card.put(photo, 66, 75)
    card.text(178, 44, "my_face", 22, "#2a2018")
    for row, length in enumerate((84, 66, 76)):
        card.box(136, 70 + 20 * row, 136 + length, 78 + 20 * row, "#c9cfd7", radius=4)
    canvas.put(card, 148, 200, angle=3)
    arrow(canvas, 312, 200)
    canvas.put(portrait(SKETCH), 468, 200, angle=-4, size=1.3)


def landscape(sky: str, sun: str, sea: str, rock: str) -> Canvas:
    """A lighthouse on a cliff, 200 by 200."""
    canvas = Canvas(200, 200)
    canvas.box(0, 0, 200, 200, sky)
    canvas.disc(62, 112, 74, fill=sun)
    canvas.box(0, 132, 200, 200, sea)
    canvas.shape((96, 200), (112, 134), (150, 118), (200, 112), (200, 200), fill=rock)
    canvas.shape((138, 122), (143, 52), (163, 52), (168, 118), fill=INK)
    canvas.shape((141, 88), (165, 88), (166, 104), (139, 104), fill="#c0472c")
    canvas.box(140, 44, 166, 54, rock)
    canvas.box(146, 30, 160, 44, ACCENT)
    canvas.shape((142, 30), (153, 18), (164, 30), fill=rock)
    return canvas


def preview_guidance(canvas: Canvas) -> None:
    moods = (
        ("#a9b4c0", "#c3ccd5", "#7d8a98", "#4f5a66"),
        ("#bfa6ac", "#dfc2a8", "#7c7690", "#503f56"),
        ("#e58a5c", "#ffd98a", "#7a4a78", "#3f2148"),
    )
    for place, mood in enumerate(moods):
        print_ = Canvas(160, 180)
        print_.box(0, 0, 160, 180, "#f7f5f1", radius=6)
        print_.put(landscape(*mood), 80, 80, size=0.7)
        canvas.put(print_, 128 + 172 * place, 262, size=0.98)
    goal = Canvas(130, 110)
    goal.box(0, 0, 130, 110, ACCENT, radius=8)
    goal.box(6, 6, 124, 104, "#e58a5c", radius=4)
    goal.disc(65, 62, 52, fill="#ffd98a")
    goal.box(6, 66, 124, 104, "#7a4a78", radius=4)
    canvas.put(goal, 472, 96, angle=-4)
    for place in range(6):
        canvas.disc(128 + 38 * place, 96, 10, fill=ACCENT)
    arrow(canvas, 374, 96)


THUMBNAILS = {
    "lookahead_face_to_portrait": face_to_portrait,
    "lookahead_fast_portrait": fast_portrait,
    "lookahead_few_steps": few_steps,
    "lookahead_style_grid": style_grid,
    "lookahead_saved_identity": saved_identity,
    "lookahead_preview_guidance": preview_guidance,
}
