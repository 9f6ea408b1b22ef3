"""The demo's labelled sheet of pictures, drawn with Pillow."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN = 144, 14, 28
_LABEL_WIDTH = 250
_PAPER, _INK, _FAINT, _BORDER = (255, 255, 255), (35, 38, 45), (105, 110, 120), (205, 208, 214)
_LINE = 21


@dataclass(frozen=True)
class Row:
    """Pictures side by side: a text at their left, and a label above each (a line break starts a second line)."""

    text: str
    labels: Sequence[str]
    pictures: Sequence[Image.Image]


def draw_sheet(title: str, subtitle: str, rows: Sequence[Row]) -> Image.Image:
    """All rows under a title; pictures are enlarged to CELL pixels without smoothing."""
    columns = max(len(row.pictures) for row in rows)
    width = 2 * MARGIN + _LABEL_WIDTH + columns * CELL + (columns - 1) * GAP
    subtitle_lines = textwrap.wrap(subtitle, (width - 2 * MARGIN) // 8)
    heights = [_label_height(row) + CELL + 2 * GAP for row in rows]
    height = 2 * MARGIN + 40 + len(subtitle_lines) * _LINE + GAP + sum(heights)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, normal, small = (ImageFont.load_default(size) for size in (28, 17, 15))

    draw.text((MARGIN, MARGIN - 6), title, fill=_INK, font=large)
    y = MARGIN + 40
    for line in subtitle_lines:
        draw.text((MARGIN, y), line, fill=_FAINT, font=small)
        y += _LINE
    y += GAP
    for row, row_height in zip(rows, heights):
        top = y + _label_height(row)
        for index, line in enumerate(_wrapped(row.text)):
            draw.text((MARGIN, top + index * _LINE), line, fill=_INK, font=normal)
        for column, (label, picture) in enumerate(zip(row.labels, row.pictures, strict=True)):
            x = MARGIN + _LABEL_WIDTH + column * (CELL + GAP)
            for index, line in enumerate(reversed(label.split("\n"))):
                place = (x + CELL / 2, top - 7 - index * _LINE)
                draw.text(place, line, fill=_INK, font=small, anchor="ms")
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST), (x, top))
            draw.rectangle((x - 1, top - 1, x + CELL, top + CELL), outline=_BORDER)
        y += row_height
    return sheet


def _label_height(row: Row) -> int:
    lines = max((len(label.split("\n")) for label in row.labels if label), default=0)
    return lines * _LINE + 8 if lines else 0


def _wrapped(text: str) -> list[str]:
    return [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, 27) or [""]]
