"""Pictures of the Perfusion workflows: a teddy, and a teddy with a cat."""

from __future__ import annotations

from painting import ACCENT, Canvas, photo

FUR, LIGHT, DARK = "#b9773f", "#ecd2ab", "#33261f"
GREY, PALE = "#8d97a8", "#e6e9ed"


def teddy() -> Canvas:
    """The head of a teddy, 200 by 200."""
    canvas = Canvas(200, 200)
    for side in (-1, 1):
        canvas.disc(100 + side * 62, 52, 62, fill=FUR)
        canvas.disc(100 + side * 62, 52, 34, fill=LIGHT)
    canvas.disc(100, 108, 162, 146, fill=FUR)
    canvas.disc(100, 140, 84, 66, fill=LIGHT)
    for side in (-1, 1):
        canvas.disc(100 + side * 36, 92, 18, 20, fill=DARK)
    canvas.disc(100, 124, 30, 20, fill=DARK)
    canvas.curve(80, 124, 120, 158, 30, 150, 4, DARK)
    return canvas


def cat() -> Canvas:
    """The head of a cat, 200 by 200."""
    canvas = Canvas(200, 200)
    for side in (-1, 1):
        canvas.shape((100 + side * 20, 60), (100 + side * 70, 12), (100 + side * 78, 96), fill=GREY)
        canvas.shape((100 + side * 40, 56), (100 + side * 63, 32), (100 + side * 66, 76), fill=PALE)
    canvas.disc(100, 110, 156, 134, fill=GREY)
    canvas.disc(100, 142, 76, 54, fill=PALE)
    for side in (-1, 1):
        canvas.disc(100 + side * 36, 98, 26, 24, fill=ACCENT)
        canvas.disc(100 + side * 36, 98, 8, 22, fill=DARK)
        canvas.box(100 + side * 58 - 22, 136, 100 + side * 58 + 22, 139, PALE)
    canvas.shape((90, 122), (110, 122), (100, 134), fill=DARK)
    return canvas


def train_concept(canvas: Canvas) -> None:
    for place, backdrop in enumerate(("#9cc3d8", "#e6c7cf", "#7fa65c", "#c7a46a")):
        canvas.put(photo(backdrop, teddy()), 120 + 120 * place, 160 + 10 * abs(2 * place - 3), angle=9 - 6 * place)
    canvas.box(200, 296, 400, 352, ACCENT, radius=28)
    canvas.text(300, 323, "100 KB", 32, "#2a2018")


def two_concepts(canvas: Canvas) -> None:
    both = Canvas(240, 200)
    both.box(0, 0, 240, 110, "#9cc3d8")
    both.box(0, 110, 240, 200, "#e3cd9a")
    both.put(teddy(), 70, 120, size=0.6)
    both.put(cat(), 172, 120, size=0.6)
    canvas.put(photo("#e6c7cf", teddy()), 96, 120, angle=4, size=0.9)
    canvas.put(photo("#7fa65c", cat()), 96, 292, angle=-4, size=0.9)
    canvas.text(214, 200, "=", 40, ACCENT)
    canvas.box(248, 76, 588, 364, "#f7f5f1", radius=8)
    canvas.put(both, 418, 210, size=1.32)


THUMBNAILS = {"perfusion_train_concept": train_concept, "perfusion_two_concepts": two_concepts}
