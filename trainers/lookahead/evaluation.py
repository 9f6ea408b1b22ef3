"""The same pairs and timesteps again and again: a loss that tells encoders of different steps apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...models.lookahead import draw_timesteps, importance
from ..evaluation import SEED_DISTANCE
from ..stopping import FixedSteps
from .batch import Batches
from .config import LookaheadConfig
from .data import FaceData
from .objective import Objective

FACELESS = 1.0
"""Loss of a preview without a face: as for somebody else's, so that no encoder is best for drawing none."""


class LookaheadEvaluation:
    """The losses on previews at full strength or, without looking ahead, the loss on the noise; no draw of training."""

    measure, higher_is_better = "evaluation", False

    def __init__(self, config: LookaheadConfig, objective: Objective, batches: Batches, data: FaceData, timesteps: int):
        """Args:
        batches: of ``data``.
        timesteps: of the noise schedule.
        """
        self._objective, self._batches, self._ahead = objective, batches, config.lookahead_every > 0
        self._seed = (config.seed + SEED_DISTANCE) % 2**62
        self._size = min(config.batch_size, config.lookahead_batch_size if self._ahead else config.batch_size)
        self._indices = data.spread(config.evaluation_pairs)
        chances = importance(timesteps, config.timestep_alpha)
        if self._ahead:
            chances = importance(config.lookahead_max_timestep, config.lookahead_alpha)
        # Quantiles of the distribution, so that few rows stand for all of it.
        count = config.evaluation_pairs
        self._timesteps = draw_timesteps(chances, (torch.arange(count, dtype=torch.float64) + 0.5) / count)

    @torch.no_grad()
    def run(self, cancelled: Callable[[], bool]) -> dict[str, float] | None:
        """Mean loss under the name ""; None when the user cancelled, which is asked before every forward pass."""
        total, count = 0.0, len(self._indices)
        for first in range(0, count, self._size):
            if cancelled():
                return None
            rows = slice(first, first + self._size)
            batch = self._batches.fixed(self._indices[rows], self._timesteps[rows], self._seed)
            loss = self._objective.ahead(batch, faceless=FACELESS) if self._ahead else self._objective.denoising(batch)
            total += float(loss) * len(batch.prompts)
        return {"": total / count}

    def state_dict(self) -> dict[str, Any]:
        """Empty: nothing but the weights decides the loss."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""


@dataclass(frozen=True)
class EvaluateEvery(FixedSteps):
    """All the steps, with an evaluation every so often and one at the end."""

    every: int = 1

    def start(self, rows: int) -> "_Evaluating":
        return _Evaluating(self.every, self.steps)


class _Evaluating:
    stopped, at_once = False, True
    measure = label = ""
    threshold = None

    def __init__(self, every: int, total: int):
        self._every, self._total, self._last = every, total, -1

    def wants_evaluation(self, steps: int) -> bool:
        return steps != self._last and (steps % self._every == 0 or steps == self._total)

    def evaluated(self, steps: int, value: float) -> dict[str, float]:
        self._last = steps
        return {}

    def should_stop(self, step: int, loss: float) -> bool:
        return False

    def explain(self, total: int) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = state.get("last", -1)  # a run that was started without evaluations knows none
