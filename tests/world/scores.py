"""From pictures to numbers: what the scorer reads, compared with what was asked for, and what to make of the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from prompts import Prompt
from scenes import Shape
from scorer import HEADS, SLOTS, Reading
from subjects import Subject
from torch import Tensor

SEEN = 0.5
"""A subject counts as present in a picture from this probability on."""


@dataclass(frozen=True)
class Scores:
    """Shares in 0..1 over some pictures; None where no picture was asked for such a thing."""

    subject: float
    """Mean probability that the subject is in the picture."""
    parts: float
    """Mean share of the subject's parts that were read right."""
    background: float
    second: float | None
    """Second objects of the right shape and colour on the right side, of those asked for."""
    style: float | None
    """Pictures in the right style, of those that were asked for in another than the flat one."""
    both: float
    """Pictures with the subject and in the style asked for, of all."""

    @property
    def prompt(self) -> float:
        """Mean of the shares of what the prompt says besides the subject."""
        return statistics.fmean(share for share in (self.background, self.second, self.style) if share is not None)


def scores_of(reading: Reading, prompts: Sequence[Prompt], subject: Subject) -> Scores:
    """What was read in n pictures, against the n prompts that they were drawn for."""
    scenes = [prompt.scene(subject.looks) for prompt in prompts]
    background = reading.background == _expected("background", [scene.background for scene in scenes])
    style = reading.style == _expected("style", [scene.style for scene in scenes])
    found = reading.subject_probability(subject.name)
    second = [
        _shows(reading, picture, SLOTS[place], thing)
        for picture, scene in enumerate(scenes)
        for place, thing in enumerate(scene.things)
        if isinstance(thing, Shape)
    ]
    styled = [hit for hit, scene in zip(style.tolist(), scenes) if scene.style != "flat"]
    return Scores(
        subject=found.mean().item(),
        parts=reading.parts_right(subject.looks).mean().item(),
        background=background.float().mean().item(),
        second=statistics.fmean(second) if second else None,
        style=statistics.fmean(styled) if styled else None,
        both=((found >= SEEN) & style).float().mean().item(),
    )


def _expected(head: str, values: Sequence) -> Tensor:
    return torch.tensor([HEADS[head].index(value) for value in values])


def _shows(reading: Reading, picture: int, slot: str, thing: Shape) -> bool:
    wanted = {f"{slot}.what": thing.shape, f"{slot}.colour": thing.colour}
    return all(reading.names(head)[picture] == value for head, value in wanted.items())


# Several seeds


@dataclass(frozen=True)
class Spread:
    """A number that was measured with several seeds."""

    mean: float
    deviation: float
    """Standard deviation over the seeds; 0 for a single one."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f}"


def verdict(holds: Sequence[bool]) -> str:
    """What to say of a claim that holds with some of the seeds."""
    if all(holds):
        return "reproduces"
    return "is not clear, the seeds disagree" if any(holds) else "does not reproduce"


def rises(values: Sequence[float]) -> bool:
    """Whether each value is above the one before it."""
    return all(later > earlier for earlier, later in zip(values, values[1:]))


# Equal subject fidelity

Curve = Sequence[tuple[float, float]]
"""(subject fidelity, prompt fidelity) of a training that grows longer or of a scale that is turned up."""
LEVELS = 11


def prompt_at(curve: Curve, subject: float) -> float:
    """Prompt fidelity where the curve first reaches a subject fidelity, along the straight line between two points.

    Raises:
        ValueError: it never does.
    """
    last = None
    for point in curve:
        if point[0] >= subject:
            if last is None or point[0] == last[0]:
                return point[1]
            share = (subject - last[0]) / (point[0] - last[0])
            return last[1] + share * (point[1] - last[1])
        last = point
    raise ValueError(f"the curve ends below a subject fidelity of {subject:.3f}")


def common_levels(curve: Curve, other: Curve) -> list[float]:
    """Subject fidelities to compare two curves at: the upper half of what both reach above their common start."""
    start = max(curve[0][0], other[0][0])
    end = min(max(point[0] for point in curve), max(point[0] for point in other))
    levels = (start + (end - start) * (0.5 + 0.5 * level / (LEVELS - 1)) for level in range(LEVELS))
    return [min(level, end) for level in levels]  # rounding must not lead beyond the end


def gain_at_equal_subject(curve: Curve, other: Curve) -> float:
    """How much more prompt fidelity a curve has than another one where their subject fidelities are equal."""
    return statistics.fmean(prompt_at(curve, level) - prompt_at(other, level) for level in common_levels(curve, other))
