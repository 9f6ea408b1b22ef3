"""What the demo trains and samples, whichever way it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from drawings import SIDE, TOKEN, WORD, Drawing
from PIL import Image

NAME = "demo_toy"
CHECKPOINT = "tiny_sdxl.safetensors"
PROMPTS = {
    f"a {TOKEN} on a yellow beach in front of a blue sea": 1,
    f"a {TOKEN} in front of a red brick wall with grey joints": 4,
}
"""Prompt -> seed of its noise."""
PLAIN = -1.0
"""Stands for plain guidance, with the LoRA on everywhere."""
COLUMNS = {
    PLAIN: "plain guidance\nwith the LoRA",
    0.0: "reward scale 0:\nbase model",
    1.0: "reward scale 1",
    3.0: "reward scale 3",
    5.0: "reward scale 5",
}
"""Reward scale -> label."""
TEXT_SCALE = 2.0
TRAINING = {
    "learning_rate": 2e-3,
    "text_learning_rate": 2e-3,
    "beta": 20.0,  # a random model has far more to gain than a trained one, so the authors' 1000 would saturate at once
    "rank": 16,
    "batch_size": 2,
    "resolution": SIDE,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "seed": 0,
}


@dataclass(frozen=True)
class Job:
    """One demo: `work` holds what is needed on the way, `checkpoint` is the tiny base model."""

    work: Path
    checkpoint: Path
    drawings: list[Drawing]
    steps: int
    sampling_steps: int


@dataclass
class Outcome:
    """What a demo produced: `pictures` by prompt and reward scale, `trained` the LoRA and embedding files."""

    curve: Image.Image
    trained: list[Path]
    pictures: dict[tuple[str, float], Path] = field(default_factory=dict)


def base_prompt(prompt: str) -> str:
    """The prompt in ordinary words."""
    return prompt.replace(TOKEN, WORD)
