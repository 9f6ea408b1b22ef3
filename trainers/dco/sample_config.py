"""Settings of sampling with a DCO LoRA from the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from ...models.errors import ConfigError
from ...models.formats import safe_name
from ..config import Precision, check_type
from ..personalization import PersonalizationSettings
from ..settings import BaseSettings

PLAIN = -1
"""Reward scale that stands for plain guidance, with the LoRA on in every row."""


@dataclass(frozen=True, kw_only=True)
class StyleSettings(PersonalizationSettings):
    """A second LoRA, such as a style for the subject."""

    reward_scale: float = PLAIN
    """Its own reward scale, with a prediction of its own; -1 lets both LoRAs act together under the first's scale."""
    prompt: str = ""
    """Prompt of its own prediction; empty takes ``sample.prompt``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.reward_scale >= 0 or self.reward_scale == PLAIN):
            raise ConfigError(f"style.reward_scale must be 0 or more, or -1, got {self.reward_scale}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to draw, and how. The scales default to the authors' (kyungmnlee/dco, reward_guidance.py)."""

    prompt: str
    """With learned tokens, such as ``a <dog> playing saxophone``."""
    base_prompt: str = ""
    """The same in ordinary words; empty replaces the tokens by their initializers."""
    negative_prompt: str = ""
    """What the picture should not show."""
    text_scale: float = 7.5
    """Classifier-free guidance by the base prompt."""
    reward_scale: float = 3.0
    """How strongly to follow what was learned; -1 is plain guidance with the LoRA on everywhere."""
    rescale: float = 0.0
    """Brings the guided prediction's contrast back towards the base model's, from 0 (off) to 1."""
    steps: int = 30
    """Sampling steps."""
    seed: int = 0
    """Of the first picture; each further one adds 1, so that any of them can be made again alone."""
    count: int = 1
    """Number of pictures."""
    width: int = 0
    """In pixels, a multiple of 8; 0 takes the base model's own."""
    height: int = 0
    """The same."""
    precision: Precision = "auto"
    """Type of the weights and of the forward pass; ``auto`` takes fp32 on a CPU and 16 bits on a GPU."""

    def __post_init__(self) -> None:
        for field, kind in get_type_hints(type(self)).items():
            check_type(f"sample.{field}", getattr(self, field), kind)
        self._require(bool(self.prompt.strip()), "prompt", "a text")
        self._require(self.text_scale >= 0, "text_scale", "0 or more")
        self._require(self.reward_scale >= 0 or self.reward_scale == PLAIN, "reward_scale", "0 or more, or -1")
        self._require(0 <= self.rescale <= 1, "rescale", "between 0 and 1")
        self._require(1 <= self.steps <= 1000, "steps", "between 1 and 1000")
        self._require(self.count >= 1, "count", "at least 1")
        self._require(0 <= self.seed and self.seed + self.count < 2**63, "seed", "between 0 and 2^63 - 1")
        for name in ("width", "height"):
            side = getattr(self, name)
            self._require(side == 0 or (side >= 64 and side % 8 == 0), name, "a multiple of 8 of at least 64, or 0")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"sample.{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Where the pictures go."""

    folder: Path = Path("output/pictures")
    """Made when missing."""
    name: str = "picture"
    """Start of the file names; the seed follows."""
    overwrite: bool = False
    """Replace files of the same name."""

    def __post_init__(self) -> None:
        safe_name(self.name)

    def path(self, seed: int) -> Path:
        return self.folder / f"{self.name}_{seed}.png"


@dataclass(frozen=True, kw_only=True)
class DCOSampleRun:
    """A whole ``dco-sample`` run."""

    base: BaseSettings
    lora: PersonalizationSettings
    sample: SampleConfig
    style: StyleSettings | None = None
    output: PictureSettings = PictureSettings()
    device: str = ""
    """``cuda``, ``cpu`` or ``mps``; empty takes the best there is."""
