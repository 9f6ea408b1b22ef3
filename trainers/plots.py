"""The loss curve as a picture, drawn with Pillow alone."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _RAW, _SMOOTH, _PAPER = (40, 44, 52), (222, 225, 230), (168, 196, 230), (21, 101, 192), (255, 255, 255)
_EVALUATED = (230, 120, 20)
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 44, 52


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each place, of fewer at the start."""
    result, total = [], 0.0
    for place, value in enumerate(values):
        total += value
        if place >= window:
            total -= values[place - window]
        result.append(total / min(place + 1, window))
    return result


def loss_curve(
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    *,
    title: str = "Loss",
    width: int = 768,
    height: int = 432,
) -> Image.Image:
    """Loss per optimizer step, pale, and its running mean over a twentieth of the run (at least 5 steps), dark.

    Values are clipped to the range between the 1st and 99th percentile, so that one outlier does not
    flatten the curve; constant and empty histories are drawn too.

    Args: evaluations: steps done and the loss on the evaluation batch, drawn in orange.
    """
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((_LEFT, 12), title, fill=_INK, font=text)
    finite = sorted(value for value in (*losses, *(loss for _, loss in evaluations)) if math.isfinite(value))
    if not finite:
        draw.text((_LEFT, height // 2), "no steps yet", fill=_INK, font=text)
        return image
    low, high = finite[len(finite) // 100], finite[-1 - len(finite) // 100]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    # A loss that cannot be negative should not be drawn on an axis that goes below zero.
    low, high = low - margin if low < 0 else max(low - margin, 0.0), high + margin
    right, bottom = width - _RIGHT, height - _BOTTOM

    def point(step: int, value: float) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * (step / max(len(losses) - 1, 1))
        level = (min(max(value, low), high) - low) / (high - low) if math.isfinite(value) else 1.0
        return x, bottom - (bottom - _TOP) * level

    for line in range(5):
        value = low + (high - low) * line / 4
        y = point(0, value)[1]
        draw.line((_LEFT, y, right, y), fill=_FAINT)
        draw.text((_LEFT - 8, y), f"{value:.3g}", fill=_INK, font=small, anchor="rm")
        step = round((len(losses) - 1) * line / 4)
        draw.text((point(step, low)[0], bottom + 8), str(step + 1), fill=_INK, font=small, anchor="ma")
    draw.text(((_LEFT + right) / 2, height - 8), "optimizer step", fill=_INK, font=small, anchor="ms")
    for values, colour, thickness in (
        (losses, _RAW, 1),
        (smoothed(losses, max(len(losses) // 20, min(5, len(losses)))), _SMOOTH, 3),
    ):
        points = [point(step, value) for step, value in enumerate(values)]
        if len(points) == 1:
            x, y = points[0]
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        else:
            draw.line(points, fill=colour, width=thickness, joint="curve")
    if evaluations:
        points = [point(max(steps - 1, 0), loss) for steps, loss in evaluations]
        draw.line(points, fill=_EVALUATED, width=3, joint="curve")
        draw.text((right, 12), "evaluation", fill=_EVALUATED, font=text, anchor="ra")
    return image
