"""Picture of the workflow that trains a word until it has converged."""

from __future__ import annotations

from painting import ACCENT, INK, Canvas, photo
from thumbnails_dco import PHOTO, dog


def train_word(canvas: Canvas) -> None:
    canvas.put(photo("#9cc3d8", dog(PHOTO)), 140, 150, angle=6, size=1.1)
    canvas.box(55, 296, 225, 352, ACCENT, radius=28)
    canvas.text(140, 323, "<dog>", 32, "#2a2018")
    # A loss that falls and then lies flat, where the training ends.
    heights = (84, 150, 196, 224, 240, 248, 252, 254, 254, 254)
    for place, y in enumerate(heights):
        canvas.disc(286 + 28 * place, y, 18, fill=ACCENT if place > 5 else INK)
    canvas.box(440, 224, 444, 300, ACCENT, radius=2)


THUMBNAILS = {"dvar_train_textual_inversion": train_word}
