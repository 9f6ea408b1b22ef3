"""Loss curves and the scores of pictures, drawn with Pillow alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .run_log import LoggedRun
from .stopping import Criterion

_INK, _FAINT, _RAW, _SMOOTH, _PAPER = (40, 44, 52), (222, 225, 230), (168, 196, 230), (21, 101, 192), (255, 255, 255)
_EVALUATED, _CRITERION, _LIMIT, _STOP = (230, 120, 20), (46, 125, 50), (142, 36, 170), (198, 40, 40)
_SERIES = (_SMOOTH, _EVALUATED, (46, 125, 50), (142, 36, 170))
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 44, 52
_DASH = 8


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
    criterion: Criterion | None = None,
    *,
    title: str = "Loss",
    width: int = 768,
    height: int = 432,
) -> Image.Image:
    """Loss per optimizer step, pale, and its running mean over a twentieth of the run (at least 5 steps), dark.

    Values are clipped to the range between the 1st and 99th percentile, so that one outlier does not
    flatten the curve; constant and empty histories are drawn too.

    Args:
        evaluations: steps done and the loss on the evaluation batch, drawn in orange.
        criterion: what a stopping rule has decided by. Below, in a panel of its own, it is drawn in green with its
            threshold in violet; a red line marks the step at which the rule ended the run.
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
    axes = _Axes(low, high, len(losses), width - _RIGHT, height - _BOTTOM)
    axes.draw(draw, "optimizer step", small)
    for values, colour, thickness in (
        (losses, _RAW, 1),
        (smoothed(losses, max(len(losses) // 20, min(5, len(losses)))), _SMOOTH, 3),
    ):
        points = [axes.point(step, value) for step, value in enumerate(values)]
        if len(points) == 1:
            x, y = points[0]
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        else:
            draw.line(points, fill=colour, width=thickness, joint="curve")
    if evaluations:
        points = [axes.point(max(steps - 1, 0), loss) for steps, loss in evaluations]
        draw.line(points, fill=_EVALUATED, width=3, joint="curve")
        draw.text((axes.right, 12), "evaluation", fill=_EVALUATED, font=text, anchor="ra")
    if criterion is None or not criterion.values:
        return image
    panel = _criterion_panel(criterion, len(losses), width, height * 2 // 3)
    both = Image.new("RGB", (width, height + panel.height), _PAPER)
    both.paste(image, (0, 0))
    both.paste(panel, (0, height))
    if criterion.stopped_at is not None:
        x = axes.point(criterion.stopped_at - 1, axes.low)[0]
        draw = ImageDraw.Draw(both)
        for top, bottom in ((_TOP, axes.bottom), (height + _TOP, both.height - _BOTTOM)):
            draw.line((x, top, x, bottom), fill=_STOP, width=2)
        draw.text((x - 6, _TOP + 4), f"stopped at {criterion.stopped_at}", fill=_STOP, font=small, anchor="ra")
    return both


def _criterion_panel(criterion: Criterion, columns: int, width: int, height: int) -> Image.Image:
    """A rule's values over the steps of the run, and their threshold as a dashed line."""
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((_LEFT, 12), criterion.label, fill=_CRITERION, font=text)
    limits = [] if criterion.threshold is None else [criterion.threshold]
    shown = [value for _, value in criterion.values] + limits
    margin = 0.05 * (max(shown) - min(shown)) or 0.05
    axes = _Axes(min(shown) - margin, max(shown) + margin, columns, width - _RIGHT, height - _BOTTOM)
    axes.draw(draw, "optimizer step", small)
    for limit in limits:
        y = axes.point(0, limit)[1]
        for x in range(_LEFT, axes.right, 2 * _DASH):
            draw.line((x, y, min(x + _DASH, axes.right), y), fill=_LIMIT, width=2)
        draw.text((axes.right, 12), f"threshold {limit:.3g}", fill=_LIMIT, font=text, anchor="ra")
    points = [axes.point(max(steps - 1, 0), value) for steps, value in criterion.values]
    draw.line(points, fill=_CRITERION, width=3, joint="curve")
    for x, y in points if len(points) <= 60 else ():
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_CRITERION)
    return image


def compared_curves(runs: Mapping[str, LoggedRun], *, width: int = 768, height: int = 432) -> Image.Image:
    """The running mean of each run's loss up to a mark where it ended, and its evaluations as a thin line.

    Each run is drawn thinner than the one before, so that those that take the same course can all be seen.

    Args: runs: at least one and at most four, by the names to show.
    """
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((_LEFT, 12), "Loss", fill=_INK, font=text)
    columns = max(len(run.losses) for run in runs.values())
    means = [smoothed(run.losses, max(columns // 20, 5)) for run in runs.values()]
    evaluated = [loss for run in runs.values() for _, loss in run.evaluations]
    shown = [value for value in (*(value for mean in means for value in mean), *evaluated) if math.isfinite(value)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    axes = _Axes(low - margin, high + margin, columns, width - _RIGHT, height - _BOTTOM)
    axes.draw(draw, "optimizer step", small)
    for place, (colour, (name, run), mean) in enumerate(zip(_SERIES, runs.items(), means)):
        points = [axes.point(step, value) for step, value in enumerate(mean)]
        draw.line(points, fill=colour, width=2 * (len(runs) - place), joint="curve")
        draw.line([axes.point(max(steps - 1, 0), loss) for steps, loss in run.evaluations], fill=colour)
        x, y = points[-1]
        draw.line((x, y, x, axes.bottom), fill=colour, width=2)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        heading = f"{name}, {len(run.losses)} steps"
        draw.text((axes.right, _TOP + 4 + 18 * place), heading, fill=colour, font=small, anchor="ra")
    return image


def score_chart(
    series: Mapping[str, Sequence[float | None]], *, title: str = "Scores", width: int = 768, height: int = 432
) -> Image.Image:
    """A point for each picture and score, a line at the mean of each score, and the means in the heading.

    Args: series: name of a score -> its values, one per picture, None where there is none; at most four.
    """
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((_LEFT, 12), title, fill=_INK, font=text)
    found = {name: [value for value in values if value is not None] for name, values in series.items()}
    everything = [value for values in found.values() for value in values]
    if not everything:
        draw.text((_LEFT, height // 2), "nothing measured", fill=_INK, font=text)
        return image
    low, high = min(*everything, 0.0), max(*everything, 1.0)
    columns = max(len(values) for values in series.values())
    axes = _Axes(low, high, columns, width - _RIGHT, height - _BOTTOM)
    axes.draw(draw, "image", small)
    edge = axes.right
    for colour, (name, values) in reversed(list(zip(_SERIES, series.items()))):
        if not found[name]:
            continue
        mean = sum(found[name]) / len(found[name])
        draw.line((axes.point(0, mean), (axes.right, axes.point(0, mean)[1])), fill=colour)
        for column, value in enumerate(values):
            if value is not None:
                x, y = axes.point(column, value)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        heading = f"{name} {mean:.3f}"
        draw.text((edge, 12), heading, fill=colour, font=text, anchor="ra")
        edge -= draw.textlength(heading, font=text) + 18
    return image


@dataclass(frozen=True)
class _Axes:
    """Where steps and values lie in a picture."""

    low: float
    high: float
    columns: int
    right: int
    bottom: int

    def point(self, column: int, value: float) -> tuple[float, float]:
        x = _LEFT + (self.right - _LEFT) * (column / max(self.columns - 1, 1))
        level = (
            (min(max(value, self.low), self.high) - self.low) / (self.high - self.low) if math.isfinite(value) else 1.0
        )
        return x, self.bottom - (self.bottom - _TOP) * level

    def draw(self, draw: ImageDraw.ImageDraw, label: str, font: ImageFont.FreeTypeFont) -> None:
        """Lines at five values, five numbers of columns, and what the columns are."""
        for line in range(5):
            value = self.low + (self.high - self.low) * line / 4
            y = self.point(0, value)[1]
            draw.line((_LEFT, y, self.right, y), fill=_FAINT)
            draw.text((_LEFT - 8, y), f"{value:.3g}", fill=_INK, font=font, anchor="rm")
            column = round((self.columns - 1) * line / 4)
            place = (self.point(column, self.low)[0], self.bottom + 8)
            draw.text(place, str(column + 1), fill=_INK, font=font, anchor="ma")
        draw.text(((_LEFT + self.right) / 2, self.bottom + _BOTTOM - 8), label, fill=_INK, font=font, anchor="ms")
