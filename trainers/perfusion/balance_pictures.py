"""The sweep of a concept's gate as pictures: what each gate makes, and how it scores."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ...models.perfusion.balance import Trial, pareto_front

_INK, _FAINT, _PAPER, _CHOSEN, _FRONT = (40, 44, 52), (222, 225, 230), (255, 255, 255), (230, 120, 20), (21, 101, 192)
_BEATEN = (160, 166, 176)
_SIDE = 192
"""Longest side of a picture on the sheet, in pixels."""
_LABEL, _GAP, _HEADING = 150, 6, 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 44, 52


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], trials: Sequence[Trial], chosen: int, prompts: Sequence[str]
) -> Image.Image:
    """A row for each trial, with its gate and scores on the left; the chosen one is framed.

    Args:
        rows: the pictures of each trial, all of one size: those of the first prompt, then those of the second ...
        prompts: written above their pictures, as far as there is room.
    """
    width, height = rows[0][0].size
    scale = min(1.0, _SIDE / max(width, height))
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    line = max(cell[1], 84) + _GAP
    sheet = Image.new("RGB", (_LABEL + len(rows[0]) * (cell[0] + _GAP) + _GAP, _HEADING + len(rows) * line), _PAPER)
    draw, text, small = ImageDraw.Draw(sheet), ImageFont.load_default(18), ImageFont.load_default(13)
    each = len(rows[0]) // len(prompts) * (cell[0] + _GAP)
    for column, prompt in enumerate(prompts):
        draw.text((_LABEL + column * each, 6), _fitting(prompt, each - _GAP, draw, small), fill=_INK, font=small)
    for number, (pictures, trial) in enumerate(zip(rows, trials, strict=True)):
        top = _HEADING + number * line
        ink = _CHOSEN if number == chosen else _INK
        draw.text((10, top + 4), f"beta {trial.beta:g}", fill=ink, font=text)
        draw.text((10, top + 26), f"tau {trial.tau:g}", fill=ink, font=text)
        draw.text((10, top + 50), f"CLIP-I {trial.likeness:.3f}", fill=ink, font=small)
        draw.text((10, top + 66), f"CLIP-T {trial.faithfulness:.3f}", fill=ink, font=small)
        for column, picture in enumerate(pictures):
            small_picture = picture.convert("RGB").resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(small_picture, (_LABEL + column * (cell[0] + _GAP), top))
        if number == chosen:
            draw.rectangle((1, top - 2, sheet.width - 2, top + line - _GAP + 1), outline=_CHOSEN, width=3)
    return sheet


def front_chart(trials: Sequence[Trial], chosen: int, *, width: int = 768, height: int = 512) -> Image.Image:
    """Likeness over faithfulness: a point for each trial, a line along the Pareto front, the chosen trial in orange."""
    image = Image.new("RGB", (width, height), _PAPER)
    draw, text, small = ImageDraw.Draw(image), ImageFont.load_default(18), ImageFont.load_default(13)
    right, bottom = width - _RIGHT, height - _BOTTOM
    across = _range([trial.faithfulness for trial in trials])
    up = _range([trial.likeness for trial in trials])

    def place(faithfulness: float, likeness: float) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * (faithfulness - across[0]) / (across[1] - across[0])
        return x, bottom - (bottom - _TOP) * (likeness - up[0]) / (up[1] - up[0])

    for step in range(5):
        x, y = (low + (high - low) * step / 4 for low, high in (across, up))
        draw.line((*place(across[0], y), *place(across[1], y)), fill=_FAINT)
        draw.text((_LEFT - 8, place(across[0], y)[1]), f"{y:.3f}", fill=_INK, font=small, anchor="rm")
        draw.text((place(x, up[0])[0], bottom + 8), f"{x:.3f}", fill=_INK, font=small, anchor="ma")
    draw.text((_LEFT, 12), "Likeness (CLIP-I)", fill=_INK, font=text)
    draw.text((right, 16), "beta / tau", fill=_INK, font=small, anchor="ra")
    draw.text(((_LEFT + right) / 2, height - 6), "faithfulness to the prompts (CLIP-T)", _INK, small, anchor="ms")
    front = pareto_front(trials)
    points = [place(trial.faithfulness, trial.likeness) for trial in trials]
    if len(front) > 1:
        draw.line([points[number] for number in front], fill=_FRONT, width=2)
    for number in sorted(range(len(trials)), key=lambda number: number == chosen):  # nothing covers the chosen one
        trial, (x, y) = trials[number], points[number]
        colour = _CHOSEN if number == chosen else _FRONT if number in front else _BEATEN
        size = 8 if number == chosen else 5
        draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)
        anchor = "rb" if x > (_LEFT + right) / 2 else "lb"  # never beyond the edge
        draw.text((x, y - size - 2), f"{trial.beta:g} / {trial.tau:g}", fill=colour, font=small, anchor=anchor)
    return image


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends, with a margin; never of no length."""
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.01
    return low - margin, high + margin


def _fitting(line: str, width: float, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """The line, or as much of its beginning as there is room for."""
    if draw.textlength(line, font=font) <= width:
        return line
    while line and draw.textlength(f"{line}…", font=font) > width:
        line = line[:-1]
    return f"{line}…"
