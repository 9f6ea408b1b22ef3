"""Pictures of the workflows that make a face encoder: invented people, learned from, and measured."""

from __future__ import annotations

from dataclasses import replace

from painting import ACCENT, INK, Canvas
from thumbnails_lookahead import FLAT, OIL, PHOTO, SKETCH, Look, arrow, portrait

ANN = PHOTO
BEN = replace(PHOTO, backdrop="#d8c39c", skin="#8d5a3a", shade="#74462b", hair="#1e1512", clothes="#a23b3b")
EVE = replace(PHOTO, backdrop="#a9cfa5", skin="#f3cfb0", shade="#dbb08c", hair="#c98a2c", clothes="#3d4f8f")


def painted(person: Look) -> Look:
    """The person in warm oil colours."""
    return replace(person, backdrop=OIL.backdrop, clothes=OIL.clothes, lips=OIL.lips)


def drawn(person: Look) -> Look:
    """The person in flat colours of the others' hair."""
    return replace(person, backdrop=FLAT.backdrop, skin=FLAT.skin, shade=FLAT.shade, clothes=FLAT.clothes)


def generate_identities(canvas: Canvas) -> None:
    for row, person in enumerate((ANN, BEN, EVE)):
        y = 70 + 130 * row
        canvas.box(28, y - 18, 148, y + 18, INK, radius=18)
        canvas.text(88, y, ("Marta", "Baraka", "Astrid")[row], 22, "#2a2018")
        for column, look in enumerate((person, painted(person), drawn(person))):
            canvas.put(portrait(look), 236 + 134 * column, y, size=0.66)


def train_encoder(canvas: Canvas) -> None:
    for row, person in enumerate((ANN, BEN, EVE)):
        canvas.put(portrait(person), 96, 76 + 124 * row, angle=4 - 4 * row, size=0.62)
        canvas.put(portrait(painted(person)), 196, 76 + 124 * row, angle=4 * row - 4, size=0.62)
    arrow(canvas, 300, 200)
    canvas.box(352, 110, 572, 290, "#f7f5f1", radius=14)
    heights = (138, 92, 104, 68, 76, 46, 52, 34, 38, 28)
    for place, height in enumerate(heights):
        canvas.disc(376 + 19 * place, 268 - height, 11, fill=ACCENT)
    canvas.box(366, 270, 558, 274, "#8a93a0", radius=2)


def validate_encoder(canvas: Canvas) -> None:
    canvas.put(portrait(PHOTO), 118, 200, angle=4, size=1.1)
    arrow(canvas, 244, 200)
    for place, look in enumerate((OIL, SKETCH)):
        x = 356 + 152 * place
        canvas.put(portrait(look), x, 150, size=0.9)
        canvas.box(x - 60, 268, x + 60, 292, "#3a4656", radius=12)
        canvas.box(x - 60, 268, x + (44, 26)[place], 292, ACCENT, radius=12)
        canvas.text(x, 320, ("0.71", "0.64")[place], 26)


THUMBNAILS = {
    "lookahead_generate_identities": generate_identities,
    "lookahead_train_encoder": train_encoder,
    "lookahead_validate_encoder": validate_encoder,
}
