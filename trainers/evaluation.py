"""A recipe's own objective on DVAR's evaluation batch: cached latents, one forward pass, no autoencoder."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.dvar import EvaluationBatch, EvaluationBatches, EvaluationSettings, GeneratorDraws
from .cache import LatentCache

SEED_DISTANCE = 2**32
"""Between the seeds of the training and of its evaluation, so that they do not begin with the same noise."""


class Evaluator(Protocol):
    """What a training loop asks of whatever a stopping rule looks at."""

    measure: str
    """Name of the value in the log."""
    higher_is_better: bool

    def run(self, cancelled: Callable[[], bool]) -> dict[str, float] | None:
        """Values of the weights as they are now, "" for the one that rules look at; None when the user cancelled.

        Args: cancelled: asked before every forward pass.
        """

    def state_dict(self) -> dict[str, Any]:
        """What decides the coming values besides the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""


class Evaluation:
    """Evaluates with draws of its own: training takes the same course with and without it.

    Pictures are evaluated in their first cut, unmirrored; the noise has no offset.
    """

    measure, higher_is_better = "evaluation", False

    def __init__(
        self,
        settings: EvaluationSettings,
        latents: LatentCache,
        *,
        timesteps: int,
        seed: int,
        loss: Callable[[EvaluationBatch], Tensor],
    ) -> None:
        """Args:
        timesteps: of the noise schedule.
        seed: of the training.
        loss: the recipe's loss on one batch, a scalar; called without gradient.
        """
        self._draws = GeneratorDraws((seed + SEED_DISTANCE) % 2**63)
        self._batches = EvaluationBatches(settings, latents, timesteps, self._draws)
        self._loss = loss

    @torch.no_grad()
    def run(self, cancelled: Callable[[], bool]) -> dict[str, float] | None:
        """Mean loss by interval of timesteps, "" for the one that rules look at; None when the user cancelled.

        Args: cancelled: asked before every forward pass.
        """
        losses: dict[str, list[float]] = {}
        for batch in self._batches.batches():
            if cancelled():
                return None
            losses.setdefault(batch.interval, []).append(float(self._loss(batch)))
        return {interval: sum(parts) / len(parts) for interval, parts in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """What decides the coming batches."""
        return self._draws.state_dict() | self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._draws.load_state_dict(state)
        self._batches.load_state_dict(state)
