"""What the demo trains and samples, whichever way it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from methods import BETA, SETTINGS
from PIL import Image
from subjects import SUBJECTS, WORD

from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.dataset import Dataset, Example

SUBJECT = SUBJECTS["zib"]
NAME = f"demo_{SUBJECT.name}"
CHECKPOINT = "world_sdxl.safetensors"
PLAIN = -1.0
"""Stands for plain guidance, with the LoRA on everywhere, in place of a reward scale."""


@dataclass(frozen=True)
class Column:
    """One way to draw a prompt; `base_subject` is what the base model is told in the token's place."""

    file: str
    label: str
    reward_scale: float
    base_subject: str = f"a {WORD}"


COLUMNS = (
    Column("before_word", f"before:\n“a {WORD}”", 0.0),
    Column("before_description", "before: the subject\ndescribed in words", 0.0, SUBJECT.description),
    Column("after_plain", "after: the LoRA\nin a plain KSampler", PLAIN),
    Column("after_reward_1", "after: reward\nscale 1", 1.0),
    Column("after_reward_2", "reward\nscale 2", 2.0),
    Column("after_reward_4", "reward\nscale 4", 4.0),
)
PROMPTS = {
    "{} on the right in a room": 1,
    "{} on the left and a blue circle on the right in the snow": 2,
    "{} on a beach in neon style": 3,
}
"""Prompt with a place for the subject -> seed of its noise; from the prompts that settings may be chosen by."""
TRAINING = SETTINGS | {
    "beta": BETA,
    "gradient_checkpointing": False,
    "seed": 0,
    "checkpoint_every": 0,
    "resume": False,
}
"""What the measurements of tests/world use, in one go."""


@dataclass(frozen=True)
class Job:
    """One demo: `work` holds what is needed on the way, `lessons` the training pictures and their captions."""

    work: Path
    checkpoint: Path
    lessons: Path
    steps: int
    sampling_steps: int

    def examples(self) -> tuple[Example, ...]:
        """The training pictures in their order."""
        return Dataset.from_folder(self.lessons, tokens=[LearnedToken(SUBJECT.token, WORD)]).examples


@dataclass
class Outcome:
    """What a demo produced: `pictures` by prompt and column, `trained` the LoRA and embedding files."""

    curve: Image.Image
    trained: list[Path]
    pictures: dict[tuple[str, Column], Path] = field(default_factory=dict)


def personalized(prompt: str) -> str:
    """The prompt with the learned word in it."""
    return prompt.format(f"a {SUBJECT.token}")
