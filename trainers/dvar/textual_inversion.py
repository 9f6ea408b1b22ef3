"""Textual Inversion: new words for a model that stays as it is (arXiv 2208.01618)."""

from pathlib import Path
from typing import Any

from ...models.errors import ConfigError
from ..base import TrainingBase
from ..config import build
from ..dataset import Dataset
from ..outcome import Outcome
from ..output import OutputPlace, save_embeddings
from ..preparation import run_from_settings
from ..prepared import Prepared
from ..progress import Progress
from ..ranks import Ranks
from .config import TextualInversionConfig, TextualInversionRun
from .train import Method, train_method


def train(
    config: TextualInversionConfig, base: TrainingBase, dataset: Dataset, place: OutputPlace, **surroundings: Any
) -> Outcome:
    """Train the dataset's tokens; arguments and errors as for train_method.

    Gradients and the optimizer's state exist for the new rows alone, not for the embedding tables.
    """
    if not dataset.tokens:
        raise ConfigError("Textual Inversion trains tokens, and the dataset has none; give one, such as <dog>")
    if dataset.class_examples:
        raise ConfigError(
            "Textual Inversion leaves the model as it is, so that there is no class to preserve; "
            "take the class pictures out of the dataset"
        )
    return train_method(Method(save_tokens, main=False), config, base, dataset, place, **surroundings)


def save_tokens(prepared: Prepared) -> list[Path]:
    """One embedding file per token."""
    return save_embeddings(
        prepared.place,
        prepared.text.rows(),
        prepared.dataset.tokens,
        overwrite=prepared.overwrite,
        family=prepared.base.family.name,
        method="textual-inversion",
        title=prepared.place.name,
        config=prepared.config.as_dict(),
        extra=prepared.around.metadata,
    )


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``textual-inversion`` recipe; values as in textual_inversion.example.toml."""
    return run_from_settings(build(TextualInversionRun, values), train, progress, ranks)
