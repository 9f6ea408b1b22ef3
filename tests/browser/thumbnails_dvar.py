"""Pictures of the workflows that train until the loss lies flat."""

from __future__ import annotations

from painting import ACCENT, INK, Canvas, photo
from thumbnails_dco import PHOTO, dog

HEIGHTS = (84, 150, 196, 224, 240, 248, 252, 254, 254, 254)
"""A loss that falls and then lies flat."""


def falling(canvas: Canvas) -> None:
    """The loss on the right, with the step at which the training ends."""
    for place, y in enumerate(HEIGHTS):
        canvas.disc(286 + 28 * place, y, 18, fill=ACCENT if place > 5 else INK)
    canvas.box(440, 224, 444, 300, ACCENT, radius=2)


def train_word(canvas: Canvas) -> None:
    canvas.put(photo("#9cc3d8", dog(PHOTO)), 140, 150, angle=6, size=1.1)
    canvas.box(55, 296, 225, 352, ACCENT, radius=28)
    canvas.text(140, 323, "<dog>", 32, "#2a2018")
    falling(canvas)


def train_lora(canvas: Canvas) -> None:
    canvas.put(photo("#9cc3d8", dog(PHOTO)), 140, 150, angle=6, size=1.1)
    # Two narrow matrices, and the wide one that they make.
    canvas.box(62, 284, 80, 364, ACCENT, radius=6)
    canvas.box(92, 284, 172, 302, ACCENT, radius=6)
    canvas.box(92, 312, 172, 364, "#4a5568", radius=6)
    falling(canvas)


def train_attention(canvas: Canvas) -> None:
    canvas.put(photo("#9cc3d8", dog(PHOTO)), 140, 150, angle=6, size=1.1)
    # What cross-attention is made of: of four weights, keys and values are trained.
    for place, (name, fill) in enumerate((("Q", "#4a5568"), ("K", ACCENT), ("V", ACCENT), ("O", "#4a5568"))):
        canvas.box(50 + 48 * place, 300, 90 + 48 * place, 348, fill, radius=8)
        canvas.text(70 + 48 * place, 323, name, 24, "#2a2018" if fill == ACCENT else INK)
    falling(canvas)


def train_consistent(canvas: Canvas) -> None:
    # The subject in front of what the base model makes of its class.
    canvas.put(photo("#4a5568"), 116, 132, angle=-8, size=0.95)
    canvas.put(photo("#9cc3d8", dog(PHOTO)), 160, 160, angle=6, size=1.05)
    canvas.box(75, 302, 245, 358, ACCENT, radius=28)
    canvas.text(160, 329, "<dog>", 32, "#2a2018")
    falling(canvas)


def compare_rules(canvas: Canvas) -> None:
    colours = ("#7fb3ee", ACCENT, "#7fc38a")
    for place in range(18):
        y = 90 + 190 * (1 - 0.76**place)
        canvas.disc(74 + 26 * place, y, 16)
    for stop, colour in zip((5, 9, 16), colours):
        x, y = 74 + 26 * stop, 90 + 190 * (1 - 0.76**stop)
        canvas.box(x - 2, y, x + 2, 350, colour, radius=2)
        canvas.disc(x, y, 30, fill=colour)


THUMBNAILS = {
    "dvar_train_textual_inversion": train_word,
    "dvar_train_dreambooth": train_lora,
    "dvar_train_custom_diffusion": train_attention,
    "dvar_train_dco": train_consistent,
    "dvar_compare_rules": compare_rules,
}
