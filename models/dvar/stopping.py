"""When to stop: the variance rule of DVAR, the CLIP plateau that the paper compares it with, the authors' numbers."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """The authors' numbers for one method (their README; steps are micro-batches there)."""

    window: int
    """Evaluations, one per step, whose variance is compared."""
    eps: float
    """Share of the whole variance below which training stops."""
    short_steps: int
    """A fixed budget about as long as DVAR's runs."""
    full_steps: int
    """Steps of an ordinary run, and the most that DVAR may take."""
    clip_patience: int
    """Checks, 50 steps apart, without improvement that the CLIP plateau waits for."""
    clip_eps: float
    """CLIP score that counts as an improvement."""
    clip_sampling_steps: int
    """Sampling steps of the pictures of a check."""
    clip_guidance: float
    """Their guidance scale."""


PRESETS = {
    "textual inversion": Preset(310, 0.15, 475, 6100, 6, 0.02, 50, 7.5),
    "custom diffusion": Preset(180, 0.15, 367, 500, 6, 0.02, 50, 6.0),
    "dreambooth": Preset(440, 0.4, 450, 1000, 3, 0.04, 200, 6.0),
}


class VarianceStop:
    """Stop when Var(last ``window`` losses) / Var(all losses so far) < ``eps`` (arXiv 2302.04841, algorithm 1).

    Both variances divide by the count, and the whole history includes the window. The value is 1 until more
    losses than a window have been seen. Losses without any variance converge as soon as a window is full, with
    the value 0; the authors' code divides 0 by 0 there and never stops (early_stopping.py).

    Each loss takes O(window) time, and memory does not grow with the history.
    """

    def __init__(self, window: int, eps: float) -> None:
        """Raises: ConfigError: no variance of one loss, or a threshold that stops at once or never."""
        if window < 2:
            raise ConfigError(f"window must be at least 2 evaluations, got {window}")
        if not 0 < eps <= 1:
            raise ConfigError(f"eps must be above 0 and at most 1, the share of a run without a plateau; got {eps}")
        self.window, self.eps = window, eps
        self.value = 1.0
        """Of the newest loss."""
        self.stopped = False
        """Whether a value has been below ``eps``."""
        self.count = 0
        self._mean, self._deviations = 0.0, 0.0  # of all losses: Welford's sums
        self._recent: deque[float] = deque(maxlen=window)

    @property
    def constant(self) -> bool:
        """Whether all losses so far were equal."""
        return self._deviations == 0

    def update(self, loss: float) -> float:
        """The value after one more loss. One that is not a number is left out: training's own guard sees to it."""
        if not math.isfinite(loss):
            return self.value
        self.count += 1
        self._recent.append(loss)
        distance = loss - self._mean
        self._mean += distance / self.count
        self._deviations += distance * (loss - self._mean)
        if self.count >= self.window and self.constant:
            self.value = 0.0
        elif self.count > self.window:
            self.value = _variance(self._recent) / (self._deviations / self.count)
        self.stopped = self.stopped or self.value < self.eps
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the coming values, fit for JSON."""
        return {
            "count": self.count,
            "mean": self._mean,
            "deviations": self._deviations,
            "recent": list(self._recent),
            "value": self.value,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly from ``state_dict``."""
        self.count, self._mean, self._deviations = state["count"], state["mean"], state["deviations"]
        self._recent = deque(state["recent"], maxlen=self.window)
        self.value, self.stopped = state["value"], state["stopped"]


def _variance(losses: deque[float]) -> float:
    mean = math.fsum(losses) / len(losses)
    return math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)


class PlateauStop:
    """Stop after more than ``patience`` checks in a row that did not beat the best score by more than ``eps``.

    The best score is raised only by such improvements (yandex-research/DVAR, early_stopping.py). Once stopped,
    further scores change nothing.
    """

    def __init__(self, patience: int, eps: float) -> None:
        """Raises: ConfigError: a number below 0."""
        if patience < 0 or not eps >= 0:
            raise ConfigError(f"patience and eps must be 0 or more, got {patience} and {eps}")
        self.patience, self.eps = patience, eps
        self.best: float | None = None
        self.no_improvement = 0
        self.stopped = False

    def update(self, score: float) -> bool:
        """Whether to stop after one more check; higher scores are better."""
        if self.stopped:
            return True
        if self.best is None or score > self.best + self.eps:
            self.best, self.no_improvement = score, 0
        else:
            self.no_improvement += 1
            self.stopped = self.no_improvement > self.patience
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the coming answers, fit for JSON."""
        return {"best": self.best, "no_improvement": self.no_improvement, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly from ``state_dict``."""
        self.best, self.no_improvement, self.stopped = state["best"], state["no_improvement"], state["stopped"]
