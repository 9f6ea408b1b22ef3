"""Which gate of a concept to sample with, from how pictures made with each gate score."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

BETAS, TAUS = (-2.0, 4.0), (0.001, 2.0)
"""Smallest and largest value that sampling offers."""
_ALIKE = 1e-9


@dataclass(frozen=True)
class Trial:
    """A gate, and the mean scores of the pictures made with it."""

    beta: float
    tau: float
    likeness: float
    """To the concept's own pictures, such as CLIP-I; more is better."""
    faithfulness: float
    """To the prompts, such as CLIP-T; more is better."""


def read_values(text: str, name: str, limits: tuple[float, float]) -> list[float]:
    """Numbers separated by commas or white space, ascending and each once.

    Raises:
        ConfigError: there is none, one is no number, or one is beyond the limits.
    """
    values = set()
    for word in re.split(r"[\s,;]+", text.strip()):
        try:
            value = float(word)
        except ValueError:
            raise ConfigError(
                f"{name}: {word!r} is no number; write numbers separated by commas, such as {limits[1] / 4:g}"
            ) from None
        if not limits[0] <= value <= limits[1]:
            raise ConfigError(f"{name}: {word} is out of range; it goes from {limits[0]:g} to {limits[1]:g}")
        values.add(value)
    return sorted(values)


def pareto_front(trials: Sequence[Trial]) -> list[int]:
    """Positions of the trials that no other one beats in one score without losing in the other, by falling likeness."""

    def beaten(one: Trial) -> bool:
        return any(
            other.likeness >= one.likeness
            and other.faithfulness >= one.faithfulness
            and (other.likeness, other.faithfulness) != (one.likeness, one.faithfulness)
            for other in trials
        )

    front = [place for place, trial in enumerate(trials) if not beaten(trial)]
    return sorted(front, key=lambda place: (-trials[place].likeness, trials[place].beta, trials[place].tau))


def balances(trials: Sequence[Trial]) -> list[float]:
    """How balanced each trial is, 0 to 1: the harmonic mean of its two scores, each scaled to 0..1 over all trials.

    A score that is the same for all trials decides nothing and counts as 1.

    Raises:
        ConfigError: there is no trial, or a score is no number.
    """
    if not trials:
        raise ConfigError("there is no gate to choose from; give at least one beta and one tau")
    for trial in trials:
        if not math.isfinite(trial.likeness + trial.faithfulness):
            raise ConfigError(
                f"the pictures of beta {trial.beta:g} and tau {trial.tau:g} have no score that is a number; leave "
                "these values out"
            )
    likeness = _scaled([trial.likeness for trial in trials])
    faithfulness = _scaled([trial.faithfulness for trial in trials])
    return [2 * one * other / (one + other) if one + other else 0.0 for one, other in zip(likeness, faithfulness)]


def choose(trials: Sequence[Trial]) -> int:
    """Position of the most balanced trial on the Pareto front; of equals the one with the lower beta, then tau."""
    scores = balances(trials)
    front = pareto_front(trials)
    best = max(scores[place] for place in front)
    equals = [place for place in front if scores[place] >= best - _ALIKE]
    return min(equals, key=lambda place: (trials[place].beta, trials[place].tau))


def balance_table(trials: Sequence[Trial]) -> str:
    """The trials as a Markdown table: scores, balance, and which are on the front and chosen."""
    scores, front, chosen = balances(trials), pareto_front(trials), choose(trials)
    rows = [["beta", "tau", "CLIP-I", "CLIP-T", "balance", ""], ["---:"] * 5 + ["---"]]
    for place, trial in enumerate(trials):
        mark = "chosen" if place == chosen else "front" if place in front else ""
        numbers = (trial.likeness, trial.faithfulness, scores[place])
        rows.append([f"{trial.beta:g}", f"{trial.tau:g}", *(f"{number:.4f}" for number in numbers), mark])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high - low > _ALIKE else 1.0 for value in values]
