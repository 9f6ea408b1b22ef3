"""DreamBooth with a LoRA on the UNet instead of whole weights (arXiv 2208.12242)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import ATTENTION, add_lora, read_lora
from ..base import TrainingBase
from ..config import build
from ..dataset import Dataset
from ..outcome import Outcome
from ..output import OutputPlace, save_personalization
from ..preparation import run_from_settings
from ..prepared import Prepared
from ..progress import Progress
from ..ranks import Ranks
from .config import DreamBoothConfig, DreamBoothRun
from .train import Method, train_method


def train(
    config: DreamBoothConfig, base: TrainingBase, dataset: Dataset, place: OutputPlace, **surroundings: Any
) -> Outcome:
    """Train a LoRA on the UNet's attention, and the dataset's tokens if it has any; as for train_method.

    The authors' LoRA also changes the feed-forward layers' first projection.
    """
    return train_method(Method(save_lora, attach=attach_lora), config, base, dataset, place, **surroundings)


def attach_lora(prepared: Prepared) -> Mapping[str, nn.Parameter]:
    """A fresh LoRA on the UNet; its parameters."""
    return add_lora(prepared.unet, prepared.config.rank, ATTENTION, prepared.generator)


def save_lora(prepared: Prepared) -> list[Path]:
    """The LoRA, and one embedding file per token."""
    return save_personalization(
        prepared.place,
        read_lora(prepared.unet, "unet"),
        prepared.text.rows(),
        prepared.dataset.tokens,
        family=prepared.base.family,
        layers_per_block=prepared.base.layers_per_block,
        method="dreambooth",
        config=prepared.config,
        overwrite=prepared.overwrite,
        extra=prepared.around.metadata,
    )


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``dreambooth`` recipe; values as in dreambooth.example.toml."""
    return run_from_settings(build(DreamBoothRun, values), train, progress, ranks)
