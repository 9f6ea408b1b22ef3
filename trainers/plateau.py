"""Stop when sampled pictures no longer come closer to the training pictures: the rule that DVAR is compared with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.dvar import PRESETS, PlateauStop
from ..models.errors import ConfigError, FormatError
from .network_folders import folder_files, network_in


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """The pictures that are sampled at every check, from the same noise each time, and what compares them."""

    clip: Path
    """Folder with a CLIP in transformers' layout, such as openai/clip-vit-base-patch32, or a CLIP-Vision file."""
    count: int = 8
    """Pictures per check."""
    prompts: tuple[str, ...] = ()
    """What they show, taken round and round; empty takes some of the prompts that the training shows pictures with."""
    steps: int = 50
    """Sampling steps of a picture."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    seed: int = 37
    """Of the noise, and of the choice among the training's prompts."""

    def __post_init__(self) -> None:
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the check's {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"the check's guidance must be 0 or more, got {self.guidance}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"the check's seed must be between 0 and 2^63 - 1, got {self.seed}")

    def check(self) -> None:
        """Raise FormatError when there is no CLIP where the settings say."""
        if not self.clip.is_file() and network_in(self.clip) != "clip":
            raise FormatError(
                f"{self.clip}: no CLIP there for the CLIP plateau to compare pictures with; put config.json, "
                "model.safetensors and preprocessor_config.json of openai/clip-vit-base-patch32 into that folder, or "
                "choose another one"
            )

    def choose(self, shown: Sequence[str]) -> list[str]:
        """The prompt of each picture, given those that the training shows its pictures with."""
        pool = list(self.prompts)
        if not pool:
            generator = torch.Generator().manual_seed(self.seed)
            pool = [shown[place] for place in torch.randperm(len(shown), generator=generator).tolist()]
        return [pool[place % len(pool)] for place in range(self.count)]

    def identity(self) -> str:
        """What decides the pictures and their likeness; a CLIP goes by its name and the size of its files."""
        paths = [self.clip] if self.clip.is_file() else folder_files(self.clip)
        sizes = [path.stat().st_size for path in paths]
        return f"{self.clip.name} {sizes} {self.count} {self.prompts} {self.steps} {self.guidance} {self.seed}"


@dataclass(frozen=True, kw_only=True)
class CLIPPlateau:
    """Stop when the CLIP similarity of sampled pictures to the training pictures has stopped rising.

    As in the authors' code (yandex-research/DVAR, textual_inversion.py), a check comes after every so many steps
    and may end the training right there. They compare each picture with one training picture, we with all of them.
    """

    pictures: PictureSettings
    patience: int = PRESETS["dreambooth"].clip_patience
    """Checks in a row without improvement that are waited for; one more ends the training."""
    eps: float = PRESETS["dreambooth"].clip_eps
    """By how much the similarity must rise to count as an improvement."""
    every: int = 50
    """Optimizer steps between checks."""
    max_steps: int = 0
    """Most optimizer steps; 0 takes the trainer's own setting."""

    rule = "clip"
    evaluation = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"the CLIP plateau's every must be at least 1, got {self.every}")
        if self.max_steps < 0:
            raise ConfigError(f"the CLIP plateau's max_steps must be 0 or more, got {self.max_steps}")
        if not 0 < self.eps <= 1:
            raise ConfigError(
                f"the CLIP plateau's eps must be above 0 and at most 1, the rise of a similarity; got {self.eps}"
            )
        PlateauStop(self.patience, self.eps)  # refuses what it cannot work with

    def limit(self, steps: int) -> int:
        return self.max_steps or steps

    def start(self, rows: int) -> "_Checking":
        return _Checking(self)

    def identity(self) -> str:
        return f"clip {self.patience} {self.eps} {self.every} {self.pictures.identity()}"


class _Checking:
    at_once = True
    measure, label = "clip", "CLIP similarity"

    def __init__(self, rule: CLIPPlateau) -> None:
        self._every, self._last = rule.every, 0
        self._stop = PlateauStop(rule.patience, rule.eps)

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    @property
    def threshold(self) -> float | None:
        return None if self._stop.best is None else self._stop.best + self._stop.eps

    def wants_evaluation(self, steps: int) -> bool:
        return steps % self._every == 0 and steps != self._last

    def evaluated(self, steps: int, value: float) -> dict[str, float]:
        self._last = steps
        if math.isfinite(value):
            self._stop.update(value)
        return {self.measure: value}

    def should_stop(self, step: int, loss: float) -> bool:
        return self.stopped

    def explain(self, total: int) -> str:
        stop = self._stop
        if self.stopped:
            return (
                f"CLIP plateau: the similarity to the pictures did not rise by more than {stop.eps:g} above "
                f"{stop.best:.3f}; checks in a row, {self._every} steps apart: {stop.no_improvement}"
            )
        # The first check can only set the mark.
        if total < (needed := (stop.patience + 2) * self._every):
            return (
                f"the CLIP plateau could not stop this run: it needs {stop.patience + 2} checks, so {needed} steps, "
                f"and the budget is {total}; lower patience or every, or allow more steps"
            )
        if stop.best is not None:
            return (
                f"the CLIP plateau was not met: the similarity last rose to {stop.best:.3f}; checks since "
                f"then: {stop.no_improvement}"
            )
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, **self._stop.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = state["last"]
        self._stop.load_state_dict(state)
