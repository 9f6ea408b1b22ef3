"""The evaluation batch of DVAR: the same pictures, latents, noise, captions and timesteps at every evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError

INTERVALS = ("begin", "middle", "end")
PARTS = ("images", "latents", "noise", "captions", "timesteps")
"""What the digits of the code stand for, in order."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the evaluation batch is made. Everything fixed, as by default, is the paper's method."""

    batch_size: int = 4
    """Rows of one forward pass."""
    accumulation: int = 1
    """Forward passes per evaluation, each with other timesteps; their losses are averaged."""
    code: str = "11111"
    """One digit each for images, latents, noise, captions and timesteps: 1 keeps them, 0 draws them anew."""
    mean_latent: bool = False
    """The mean of the autoencoder's posterior in place of a draw from it."""
    mean_noise: bool = False
    """Zero, the mean of the noise, in place of a draw, where the noise is kept."""
    intervals: bool = False
    """Also the loss on the beginning, middle and end of the timesteps: four times the work, no part in the rule."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the evaluation's {name} must be at least 1, got {getattr(self, name)}")
        if len(self.code) != len(PARTS) or set(self.code) - {"0", "1"}:
            raise ConfigError(
                f"the evaluation's code must be five digits 0 or 1 for {', '.join(PARTS)}, such as 11111; "
                f"got {self.code!r}"
            )

    @property
    def rows(self) -> int:
        """Rows that go through the UNet at one evaluation."""
        return self.batch_size * self.accumulation * (1 + len(INTERVALS) * self.intervals)

    def check(self, timesteps: int) -> None:
        """Raise ConfigError when one evaluation needs more different timesteps than the schedule, or a third, has."""
        needed = self.batch_size * self.accumulation
        there = min(map(len, intervals(timesteps).values())) if self.intervals else timesteps
        if needed > there:
            raise ConfigError(
                f"an evaluation of {self.accumulation} x {self.batch_size} rows needs as many different timesteps, "
                f"and there are {there}; lower the evaluation's batch size or accumulation"
            )

    def keeps(self, part: str) -> bool:
        """Whether ``part``, one of PARTS, is the same at every evaluation."""
        return self.code[PARTS.index(part)] == "1"


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """One forward pass of an evaluation, on the CPU. The same object comes again as long as all of it is kept."""

    pictures: tuple[int, ...]
    """Number of the picture of each row."""
    captions: tuple[int, ...]
    """Number of the picture whose caption each row has."""
    latents: Tensor
    """(batch, channels, height, width)."""
    noise: Tensor
    """Same shape."""
    timesteps: Tensor
    """(batch,)."""
    interval: str = ""
    """Which of INTERVALS the timesteps are from; empty for those that the rule looks at."""


class Draws(Protocol):
    """Where random numbers come from."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Standard normal numbers."""

    def permutation(self, count: int) -> Tensor:
        """0 … count - 1 in random order, int64."""


class GeneratorDraws:
    """Draws from a generator of its own, so that training takes the same course with and without evaluations."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].to("cpu", torch.uint8))


class Moments(Protocol):
    """The posteriors of all pictures."""

    def __len__(self) -> int: ...

    def moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a picture's scaled latents, each (channels, height, width)."""


def intervals(timesteps: int) -> dict[str, range]:
    """Thirds of the schedule. The last one ends with it; the authors' [666, 999) never contains t = 999."""
    bounds = [timesteps * third // 3 for third in range(4)]
    return {name: range(first, end) for name, (first, end) in zip(INTERVALS, pairwise(bounds), strict=True)}


class EvaluationBatches:
    """The batches of each evaluation (yandex-research/DVAR, textual_inversion.py).

    Pictures come in their own order, round and round, and a caption belongs to a picture. What the code keeps is
    drawn once, here. Of the rest, in the authors' way: new pictures always bring new latents; captions that are
    not kept are those of the next batch of pictures, while kept ones stay the first batch's even when the
    pictures change. Timesteps are drawn without replacement, so that they differ within one evaluation.
    """

    def __init__(self, settings: EvaluationSettings, pictures: Moments, timesteps: int, draws: Draws) -> None:
        """Args: timesteps: of the noise schedule.

        Raises:
            ConfigError: what EvaluationSettings.check raises.
        """
        settings.check(timesteps)
        self._settings, self._moments, self._draws = settings, pictures, draws
        self._timesteps, self._position = timesteps, 0
        self._pictures = self._captions = self._next_pictures()
        self._latents = self._posterior(self._pictures)
        self._noise = draws.normal(self._latents.shape)
        self._order = draws.permutation(timesteps)
        thirds = intervals(timesteps) if settings.intervals else {}
        self._orders = {name: third.start + draws.permutation(len(third)) for name, third in thirds.items()}
        if settings.mean_latent and settings.keeps("images") and settings.keeps("latents"):
            self._latents = self._mean(self._pictures)
        if settings.mean_noise and settings.keeps("noise"):
            self._noise = torch.zeros_like(self._noise)
        self._kept = list(self._make()) if settings.code == "11111" else None

    def batches(self) -> Iterator[EvaluationBatch]:
        """The batches of one evaluation; what they draw is drawn as they are taken."""
        return self._make() if self._kept is None else iter(self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Place in the pictures; the draws' state is kept by their owner."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]

    def _make(self) -> Iterator[EvaluationBatch]:
        keeps, draws = self._settings.keeps, self._draws
        size = self._settings.batch_size
        order = self._order if keeps("timesteps") else draws.permutation(self._timesteps)
        pictures, latents, captions = self._pictures, self._latents, self._captions
        for turn in range(self._settings.accumulation):
            if not keeps("images"):
                pictures = self._next_pictures()
                latents = self._mean(pictures) if self._settings.mean_latent else self._posterior(pictures)
            elif not keeps("latents"):
                latents = self._posterior(pictures)
            noise = self._noise if keeps("noise") else draws.normal(latents.shape)
            if not keeps("captions"):
                captions = self._next_pictures()
            part = slice(size * turn, size * (turn + 1))
            for name, places in {"": order, **self._orders}.items():
                yield EvaluationBatch(pictures, captions, latents, noise, places[part], name)

    def _next_pictures(self) -> tuple[int, ...]:
        places = range(self._position, self._position + self._settings.batch_size)
        self._position = places.stop % len(self._moments)
        return tuple(place % len(self._moments) for place in places)

    def _mean(self, pictures: tuple[int, ...]) -> Tensor:
        return torch.stack([self._moments.moments(index)[0] for index in pictures])

    def _posterior(self, pictures: tuple[int, ...]) -> Tensor:
        means, deviations = zip(*(self._moments.moments(index) for index in pictures), strict=True)
        mean = torch.stack(means)
        return mean + torch.stack(deviations) * self._draws.normal(mean.shape)
