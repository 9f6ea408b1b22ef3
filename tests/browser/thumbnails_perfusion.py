"""Pictures of the Perfusion workflows: a teddy, alone, masked, on a boat and weighed, and a teddy with a cat."""

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
    canvas.text(300, 323, "40 KB", 32, "#2a2018")


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


def mask() -> Canvas:
    """The soft mask of the teddy, 200 by 200: bright where it is, dim at its edge."""
    canvas = Canvas(200, 200)
    canvas.box(0, 0, 200, 200, "#0d0f13")
    for width, shade in ((206, "#2b2e33"), (190, "#5d6168"), (174, "#a9adb4"), (158, "#f4f5f7")):
        for side in (-1, 1):
            canvas.disc(100 + side * 62, 52, width * 0.4, fill=shade)
        canvas.disc(100, 108, width, width * 0.92, fill=shade)
    return canvas


def train_with_masks(canvas: Canvas) -> None:
    for place, backdrop in enumerate(("#9cc3d8", "#e6c7cf", "#7fa65c")):
        canvas.put(photo(backdrop, teddy()), 140 + 160 * place, 118, angle=4 - 4 * place, size=0.86)
        canvas.put(photo("#0d0f13", mask()), 140 + 160 * place, 288, angle=4 * place - 4, size=0.86)


def global_locking(canvas: Canvas) -> None:
    for place, (backdrop, angle, x, y, size) in enumerate(
        (("#9cc3d8", 0, 78, 82, 0.62), ("#9cc3d8", -24, 88, 66, 0.4))
    ):
        print_ = photo(backdrop)
        if place:
            print_.shape((40, 100), (130, 100), (112, 132), (58, 132), fill="#f7f5f1")
        print_.put(teddy(), x, y, angle=angle, size=size)
        canvas.put(print_, 180 + 240 * place, 190, angle=-3 + 6 * place, size=1.3)
    canvas.shape((288, 178), (312, 194), (288, 210), fill=ACCENT)


def balance(canvas: Canvas) -> None:
    canvas.box(90, 60, 510, 350, "#f7f5f1", radius=10)
    for line in range(4):
        canvas.box(130, 300 - 62 * line, 480, 302 - 62 * line, "#d9dce2")
    points = ((150, 96), (262, 122), (362, 176), (438, 262))
    for (left, top), (right, bottom) in zip(points, points[1:]):
        canvas.shape((left, top - 2), (left, top + 2), (right, bottom + 2), (right, bottom - 2), fill="#1565c0")
    for place, (x, y) in enumerate(points):
        canvas.disc(x, y, 18, fill="#1565c0" if place != 1 else ACCENT)
    for x, y in ((190, 214), (286, 250), (352, 286)):
        canvas.disc(x, y, 14, fill="#a0a6b0")
    canvas.put(photo("#9cc3d8", teddy()), 262, 214, size=0.62)


THUMBNAILS = {
    "perfusion_train_concept": train_concept,
    "perfusion_train_with_masks": train_with_masks,
    "perfusion_two_concepts": two_concepts,
    "perfusion_global_locking": global_locking,
    "perfusion_balance": balance,
}
