"""Copies of the best weights of a run."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .optimizer import ParameterGroup

SMOOTHING_STEPS = 20
"""Steps over which the training loss is averaged where nothing is evaluated."""


class BestWeights:
    """Copies of the weights where the smoothed training loss, or the loss of an evaluation, was lowest."""

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self._parameters = {f"{g.name}.{name}": p for g in groups for name, p in g.parameters.items()}
        self._copies: dict[str, Tensor] = {}
        self._step, self._score = None, math.inf

    def smoothed(self, step: int, losses: Sequence[float]) -> None:
        """Consider the present weights by the mean of the last training losses; too few say nothing."""
        if step >= SMOOTHING_STEPS:
            self.offer(step, sum(losses[-SMOOTHING_STEPS:]) / SMOOTHING_STEPS)

    def offer(self, step: int, score: float) -> None:
        """Consider the present weights, reached after ``step`` steps; untrained ones are nobody's best."""
        if step and score < self._score:
            self._step, self._score = step, score
            self._copies = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def swap(self) -> int | None:
        """Exchange the present weights for the best ones, or back; the best ones' step, None after too short a run."""
        for name, copy in self._copies.items():
            self._copies[name] = self._parameters[name].detach().to("cpu", copy=True)
            self._parameters[name].copy_(copy)
        return self._step

    def state_dict(self) -> dict:
        return {"step": self._step, "score": self._score if self._step else None, **self._copies}

    def load_state_dict(self, state: dict) -> None:
        if not state:  # the run was started without looking for the best weights
            return
        self._copies = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._step, self._score = state["step"], math.inf if state["score"] is None else state["score"]
