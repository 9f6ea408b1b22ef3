"""When training is finished: the protocol of stopping rules and the simplest of them."""

from dataclasses import dataclass
from typing import Any, Protocol

from ..models.errors import ConfigError


class StoppingRule(Protocol):
    """Decides after every optimizer step whether training goes on; any recipe accepts any rule.

    A rule is plain settings; the state of a run lives in what ``start`` returns.
    """

    def limit(self, steps: int) -> int:
        """Most optimizer steps to take, given the configured number."""

    def start(self) -> "StoppingState":
        """A fresh state for one run."""

    def identity(self) -> str:
        """What of the rule, besides its limit, decides the course of a run; a resumed run must agree in it."""


class StoppingState(Protocol):
    """A rule at work in one run."""

    def should_stop(self, step: int, loss: float) -> bool:
        """Told the loss of optimizer step ``step`` (counted from 1), say whether it was the last one."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a resume, fit for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""


@dataclass(frozen=True)
class FixedSteps:
    """Stop after a given number of optimizer steps; 0 leaves it to the trainer's own setting."""

    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps must be 0 or more, got {self.steps}")

    def limit(self, steps: int) -> int:
        return self.steps or steps

    def start(self) -> "StoppingState":
        return _NeverEarly()

    def identity(self) -> str:
        return "fixed"


class _NeverEarly:
    def should_stop(self, step: int, loss: float) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
