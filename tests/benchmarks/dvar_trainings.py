"""Trainings of the small world's characters until a stopping rule ends them; see dvar.py.

Three trainings per method and character: one is watched, takes all its steps and evaluates the objective after each.
Rules change nothing of a training but its end, so the loss that any of them ends with is read from that one. DVAR and
the CLIP plateau also run by themselves, for their steps and for the time that they take.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
sys.path[:0] = [str(TESTS / name) for name in ("world", "host", "tiny")]

import boot  # noqa: E402 - lies in a folder that was just added

boot.declare_missing_torchvision_operators()

import judges  # noqa: E402
import weights  # noqa: E402
from clip_pair import FILE as CLIP_FILE  # noqa: E402
from clip_pair import load_pair  # noqa: E402
from methods import CPU, TEXT_SCALE  # noqa: E402
from scenes import SIDE  # noqa: E402
from subjects import SUBJECTS, write_subject  # noqa: E402

from comfyui_personalize.models.dvar import PRESETS, Preset  # noqa: E402
from comfyui_personalize.trainers.base import open_base  # noqa: E402
from comfyui_personalize.trainers.dataset import Dataset  # noqa: E402
from comfyui_personalize.trainers.dvar import custom_diffusion, dreambooth, textual_inversion  # noqa: E402
from comfyui_personalize.trainers.dvar.config import (  # noqa: E402
    CustomDiffusionConfig,
    DreamBoothConfig,
    TextualInversionConfig,
)
from comfyui_personalize.trainers.loop import TrainResult  # noqa: E402
from comfyui_personalize.trainers.output import OutputPlace  # noqa: E402
from comfyui_personalize.trainers.plateau import CLIPPlateau, PictureSettings  # noqa: E402
from comfyui_personalize.trainers.stopping import DVAR, StoppingRule  # noqa: E402

CHECKPOINT = "world_sd15.safetensors"
CHARACTERS = ("zib", "mok", "pelu")
SHORTER = 5
"""All numbers of steps are the authors' divided by this, windows and distances between checks too: the small model
learns faster."""
INVERSION_STEPS = 300
"""The full budget of Textual Inversion, a quarter of what that would be: the loss of one word is flat long before."""
METHODS = {
    "textual inversion": (textual_inversion, TextualInversionConfig, 1e-2),
    "dreambooth": (dreambooth, DreamBoothConfig, 1e-3),
    "custom diffusion": (custom_diffusion, CustomDiffusionConfig, 1e-4),
}
"""Preset -> recipe, its settings, and a learning rate that suits the small model, not scaled by the batch."""
SETTINGS = {
    "batch_size": 4,
    "scale_learning_rate": False,
    "resolution": SIDE,
    "crop": "center",
    "precision": "fp32",
    "flip": False,
    "prompts": "captions",
    "checkpoint_every": 0,
}
CHECK = {"count": 8, "steps": 10, "guidance": TEXT_SCALE}
"""Pictures of the CLIP plateau; 50 to 200 steps at guidance 6 to 7.5 are for large models."""


@dataclass(frozen=True)
class Ended:
    """A training that a rule has ended, or not."""

    steps: int
    stopped: bool
    share: float
    """Of its time that went into evaluating."""

    @classmethod
    def of(cls, result: TrainResult) -> Ended:
        return cls(result.steps, result.stopped_by == "rule", result.evaluation_share)


@dataclass(frozen=True)
class Measured:
    """One method and one character."""

    losses: list[float]
    """Evaluation loss after 0, 1, … steps up to the full budget."""
    watching: float
    """Part of the time that evaluations at every step take."""
    dvar: Ended
    clip: Ended


@dataclass(frozen=True)
class Workshop:
    """Where trainings run, and how long."""

    work: Path
    shorter: int = SHORTER
    inversion_steps: int = INVERSION_STEPS
    check: Mapping[str, float] = field(default_factory=lambda: CHECK)

    def preset(self, method: str) -> Preset:
        """The authors' numbers, shortened."""
        found = PRESETS[method]
        names = ("window", "short_steps", "full_steps")
        numbers = {name: max(2, round(getattr(found, name) / self.shorter)) for name in names}
        return replace(found, **numbers | {"full_steps": min(numbers["full_steps"], self.inversion_steps)})

    def measure(self, method: str, character: str) -> Measured:
        """Three trainings, unless they have been done before."""
        kept = self.work / f"{method} {character} {self.shorter}.json"
        if not kept.exists():
            numbers = self.preset(method)
            # The rule of a watched training never ends it; one more step shows the weights after the last.
            watched = self.train(
                method, character, numbers.full_steps + 1, DVAR(window=numbers.window, eps=1e-12, every=1)
            )
            ruled = self.train(method, character, numbers.full_steps, DVAR(window=numbers.window, eps=numbers.eps))
            losses = [loss for _, loss in watched.evaluations]
            if any(losses[steps] != loss for steps, loss in ruled.evaluations):
                raise RuntimeError(
                    f"{method}, {character}: evaluating less often has changed the course of the training"
                )
            plateau = CLIPPlateau(
                pictures=PictureSettings(clip=self._clip(), **self.check),
                patience=numbers.clip_patience,
                eps=numbers.clip_eps,
                every=max(1, CLIPPlateau.every // self.shorter),
            )
            checked = self.train(method, character, numbers.full_steps, plateau)
            found = {"losses": losses, "watching": watched.evaluation_share}
            found |= {name: vars(Ended.of(result)) for name, result in (("dvar", ruled), ("clip", checked))}
            kept.with_suffix(".partial").write_text(json.dumps(found), encoding="utf-8")
            os.replace(kept.with_suffix(".partial"), kept)
        found = json.loads(kept.read_text(encoding="utf-8"))
        return Measured(**found | {name: Ended(**found[name]) for name in ("dvar", "clip")})

    def train(self, method: str, character: str, steps: int, rule: StoppingRule) -> TrainResult:
        recipe, config, rate = METHODS[method]
        lesson = self.work / character
        write_subject(lesson, SUBJECTS[character])
        place = OutputPlace("taught", *(self.work / name for name in ("main", "embeddings", "run")), overwrite=True)
        settings = config(**SETTINGS, learning_rate=rate, steps=steps)
        base, dataset = open_base(weights.path_of(CHECKPOINT)), Dataset.from_folder(lesson)
        result = recipe.train(settings, base, dataset, place, device=CPU, stopping=rule).train
        print(f"{method}, {character}, {rule.rule}: {result.summary}", flush=True)
        return result

    def _clip(self) -> Path:
        """The small world's CLIP in transformers' layout."""
        folder = self.work / "clip"
        if not (folder / "preprocessor_config.json").exists():
            model, _ = load_pair(weights.path_of(CLIP_FILE))
            model.save_pretrained(folder)
            judges.write_preprocessor(folder)
        return folder
