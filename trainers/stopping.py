"""When training is finished: the protocol of stopping rules, a number of steps, and DVAR."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..models.dvar import PRESETS, EvaluationSettings, VarianceStop
from ..models.errors import ConfigError
from .plateau import PictureSettings

EVALUATION_SHARE = 0.25
"""Part of the step time that evaluations may take where their frequency is left to the rule."""
STEP_COST = 2
"""Forward passes that a training step costs at least, per row: its own, and a backward pass to the trained weights."""
EVALUATIONS_PER_WINDOW = 10
"""A variance of fewer values says little, so no frequency that is left to the rule gives fewer."""


@dataclass
class Criterion:
    """What a rule has decided by over a run, for people."""

    label: str = ""
    """Empty for rules that decide by nothing but the step."""
    values: list[tuple[int, float]] = field(default_factory=list)
    """Steps done, and the value of the weights then."""
    threshold: float | None = None
    """What the value had to come below, or rise above."""
    stopped_at: int | None = None
    """Steps after which the rule ended the run."""


class StoppingRule(Protocol):
    """Decides after every optimizer step whether training goes on; any recipe accepts any rule.

    A rule is plain settings; the state of a run lives in what ``start`` returns.
    """

    @property
    def evaluation(self) -> EvaluationSettings | None:
        """The batch on which the recipe is to evaluate its objective; None for rules that do not look at one."""

    @property
    def pictures(self) -> PictureSettings | None:
        """The pictures that the recipe is to sample and compare; None for rules that do not look at any."""

    def limit(self, steps: int) -> int:
        """Most optimizer steps to take, given the configured number."""

    def start(self, rows: int) -> "StoppingState":
        """A fresh state for one run that trains on ``rows`` pictures per step and process."""

    def identity(self) -> str:
        """What of the rule, besides its limit, decides the course of a run; a resumed run must agree in it."""


class StoppingState(Protocol):
    """A rule at work in one run."""

    stopped: bool
    """Whether the rule has been met; a resumed run that was stopped takes no further step."""
    at_once: bool
    """Whether the evaluation that meets the rule ends the run, so that the last weights are evaluated as well; else
    the step after it is still taken."""
    measure: str
    """Name of the number that the rule decides by, among those that ``evaluated`` returns; empty where it has none."""
    label: str
    """What people call it."""
    threshold: float | None
    """What that number must now come below, or rise above; None where there is nothing to say yet."""

    def wants_evaluation(self, steps: int) -> bool:
        """Whether the weights after ``steps`` optimizer steps are to be evaluated, before the next step is taken."""

    def evaluated(self, steps: int, value: float) -> dict[str, float]:
        """Told the loss, or the likeness, that an evaluation found; numbers to show and to log beside it."""

    def should_stop(self, step: int, loss: float) -> bool:
        """Told the loss of optimizer step ``step`` (counted from 1), say whether it was the last one."""

    def explain(self, total: int) -> str:
        """One clause for people: why the run was stopped, or what to know of the rule in a run of ``total`` steps."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a resume, fit for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""


@dataclass(frozen=True)
class FixedSteps:
    """Stop after a given number of optimizer steps; 0 leaves it to the trainer's own setting."""

    steps: int = 0

    rule = "fixed"
    evaluation = pictures = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps must be 0 or more, got {self.steps}")

    def limit(self, steps: int) -> int:
        return self.steps or steps

    def start(self, rows: int) -> "StoppingState":
        return _NeverEarly()

    def identity(self) -> str:
        return "fixed"


class _NeverEarly:
    stopped = at_once = False
    measure = label = ""
    threshold = None

    def wants_evaluation(self, steps: int) -> bool:
        return False

    def evaluated(self, steps: int, value: float) -> dict[str, float]:
        return {}

    def should_stop(self, step: int, loss: float) -> bool:
        return False

    def explain(self, total: int) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class DVAR:
    """Stop when the objective on the evaluation batch no longer changes (arXiv 2302.04841).

    The window is counted in optimizer steps, so that it means the same whatever the frequency; the authors count
    evaluations, and take one at every step.
    """

    window: int = PRESETS["dreambooth"].window
    """Optimizer steps over which the objective must have been flat."""
    eps: float = PRESETS["dreambooth"].eps
    """Share of the whole variance that counts as flat."""
    max_steps: int = 0
    """Most optimizer steps; 0 takes the trainer's own setting."""
    every: int = 0
    """Optimizer steps between evaluations; 0 chooses them by their cost."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    rule = "dvar"
    pictures = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"DVAR's {name} must be 0 or more, got {getattr(self, name)}")
        VarianceStop(self.window, self.eps)  # refuses what it cannot work with
        if self.window < 2 * self.every:
            raise ConfigError(
                f"DVAR's window of {self.window} steps holds fewer than 2 evaluations, one every {self.every} steps; "
                "make it longer or evaluate more often"
            )

    def frequency(self, rows: int) -> int:
        """Optimizer steps between evaluations in a run that trains on ``rows`` pictures per step.

        Left to the rule, evaluations take at most a quarter of the step time, unless their batch is so large or
        the window so short that the window would then hold fewer than ten of them.
        """
        if self.every:
            return self.every
        affordable = math.ceil(self.evaluation.rows / (EVALUATION_SHARE * STEP_COST * rows))
        return max(1, min(affordable, self.window // EVALUATIONS_PER_WINDOW))

    def limit(self, steps: int) -> int:
        return self.max_steps or steps

    def start(self, rows: int) -> "StoppingState":
        return _Watching(self, self.frequency(rows))

    def identity(self) -> str:
        return f"dvar {self.window} {self.eps} {self.every} {self.evaluation}"


class _Watching:
    at_once = False
    measure, label = "dvar", "normalized variance"

    def __init__(self, rule: DVAR, every: int) -> None:
        self._every, self._last = every, -1
        self._stop = VarianceStop(max(2, round(rule.window / every)), rule.eps)

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    @property
    def threshold(self) -> float:
        return self._stop.eps

    def wants_evaluation(self, steps: int) -> bool:
        return steps % self._every == 0 and steps != self._last

    def evaluated(self, steps: int, value: float) -> dict[str, float]:
        self._last = steps
        return {self.measure: self._stop.update(value)}

    def should_stop(self, step: int, loss: float) -> bool:
        # As in the authors' loop, the evaluation comes before the step, and the step is still taken.
        return self.stopped

    def explain(self, total: int) -> str:
        window, eps, value = self._stop.window * self._every, self._stop.eps, self._stop.value
        if self.stopped and self._stop.constant:
            return f"DVAR: in {window} steps the evaluation loss did not change at all; does the training learn?"
        if self.stopped:
            return (
                f"DVAR: over the last {window} steps the evaluation loss had {value:.3f} of its whole variance, "
                f"less than {eps:g}"
            )
        if total <= window:
            return (
                f"DVAR could not stop this run: its window of {window} steps is not shorter than the budget of "
                f"{total}; lower the window or allow more steps"
            )
        if self._stop.count > self._stop.window:
            return f"DVAR was not met: {value:.3f} of the whole variance, not less than {eps:g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, **self._stop.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = state["last"]
        self._stop.load_state_dict(state)
