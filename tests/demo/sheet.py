"""The demo's labelled sheet of pictures, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN = 160, 12, 28
_TEXT_WIDTH = 170
_PAPER, _INK, _FAINT, _BORDER = (255, 255, 255), (35, 38, 45), (105, 110, 120), (205, 208, 214)
_LINE = 20


@dataclass(frozen=True)
class Row:
    """Pictures side by side: a text at their left and, unless there are none, a label above each."""

    text: str
    labels: Sequence[str]
    pictures: Sequence[Image.Image]


def draw_sheet(title: str, subtitle: str, rows: Sequence[Row]) -> Image.Image:
    """All rows under a title; pictures are enlarged to CELL pixels."""
    columns = max(len(row.pictures) for row in rows)
    width = 2 * MARGIN + _TEXT_WIDTH + columns * (CELL + GAP)
    large, normal, small = (ImageFont.load_default(size) for size in (28, 17, 15))
    subtitle_lines = _wrapped(subtitle, small, width - 2 * MARGIN)
    labels = [[_wrapped(label, small, CELL) for label in row.labels] for row in rows]
    label_heights = [max(map(len, texts)) * _LINE + GAP if texts else 0 for texts in labels]
    heights = [height + CELL + GAP for height in label_heights]
    height = 2 * MARGIN + 40 + len(subtitle_lines) * _LINE + sum(heights)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    draw.text((MARGIN, MARGIN - 6), title, fill=_INK, font=large)
    y = MARGIN + 40
    for line in subtitle_lines:
        draw.text((MARGIN, y), line, fill=_FAINT, font=small)
        y += _LINE
    for row, texts, label_height, row_height in zip(rows, labels, label_heights, heights):
        top = y + label_height
        for index, line in enumerate(_wrapped(row.text, normal, _TEXT_WIDTH - GAP)):
            draw.text((MARGIN, top + index * _LINE), line, fill=_INK, font=normal)
        for column, picture in enumerate(row.pictures):
            x = MARGIN + _TEXT_WIDTH + column * (CELL + GAP)
            for index, line in enumerate(reversed(texts[column]) if texts else ()):
                draw.text((x + CELL / 2, top - 7 - index * _LINE), line, fill=_INK, font=small, anchor="ms")
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (x, top))
            draw.rectangle((x - 1, top - 1, x + CELL, top + CELL), outline=_BORDER)
        y += row_height
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken at its line breaks and between words."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines
