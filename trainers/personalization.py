"""A finished personalization read back from its files: a LoRA with the learned tokens that belong to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models.errors import ConfigError, FormatError, IncompatibleModelError
from ..models.families import FAMILIES, Family
from ..models.formats import read_header, read_weights, stored_tokens
from ..models.learned_embeddings import AUTHORS_LORA, BUNDLE, LearnedEmbedding, files_of_tokens, tokens_of_lora
from ..models.lora import LowRankDelta, parse_lora
from ..models.tokens import LearnedToken


@dataclass(frozen=True, kw_only=True)
class PersonalizationSettings:
    """Which LoRA and learned tokens to use."""

    path: Path
    """LoRA file, or the folder that the DCO authors' trainer wrote."""
    strength: float = 1.0
    """Factor on the LoRA's change of the UNet."""
    text_strength: float = 1.0
    """Factor on its change of the text encoders, where it has one."""
    embeddings: tuple[Path, ...] = ()
    """Files with its learned tokens; empty takes those that are in the LoRA file or that were saved with it."""
    tokens: tuple[LearnedToken, ...] = ()
    """Triggers and initializers in the order of training, for files that name none; they also rename tokens."""

    def __post_init__(self) -> None:
        for name in ("strength", "text_strength"):
            if not abs(getattr(self, name)) <= 100:
                raise ConfigError(f"{name} of {self.path.name} must be between -100 and 100, got {getattr(self, name)}")


@dataclass(frozen=True)
class Personalization:
    """A LoRA and its learned tokens, on the CPU."""

    name: str
    deltas: Mapping[str, LowRankDelta]
    """By published module name, starting with ``unet.``, ``text_encoder.`` or ``text_encoder_2.``."""
    tokens: tuple[LearnedToken, ...]
    embeddings: tuple[LearnedEmbedding, ...]
    """As ``tokens``."""
    settings: PersonalizationSettings

    def token_rows(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """All tokens' rows by encoder key, (sum of rows, dim) each.

        Args: widths: embedding width of each text encoder by its key.

        Raises:
            IncompatibleModelError: an encoder has no rows, or rows of another width.
        """
        parts = [embedding.fit(widths, self.name) for embedding in self.embeddings]
        return {key: torch.cat([part[key] for part in parts]) for key in widths}


def open_personalization(
    settings: PersonalizationSettings, family: Family, *, layers_per_block: int = 2
) -> Personalization:
    """Read a LoRA and its tokens.

    Args:
        layers_per_block: of the base's UNet; kohya's files number SDXL's layers by it.

    Raises:
        FormatError: a file is absent, damaged or no plain LoRA.
        IncompatibleModelError: the file says that it was trained on another family.
        ConfigError: the given tokens do not suit the rows.
    """
    path = settings.path / AUTHORS_LORA if settings.path.is_dir() else settings.path
    if not path.is_file():
        raise FormatError(f"{path}: no such LoRA file; check the path")
    tensors, metadata = read_weights(path)
    trained_on = metadata.get("personalize.family", family.name)
    if trained_on != family.name:
        label = FAMILIES[trained_on].label if trained_on in FAMILIES else trained_on
        raise IncompatibleModelError(
            f"{path.name} was trained on {label}, the base model is {family.label}; "
            "choose the base model it was trained on"
        )
    embeddings, initializers = _tokens(path, tensors, metadata, settings)
    tokens = tuple(
        LearnedToken(found.trigger, initializers.get(found.trigger, ""), len(next(iter(found.rows.values()))))
        for found in embeddings
    )
    deltas = parse_lora(tensors, path.name, layers_per_block=layers_per_block)
    if not deltas and not tokens:
        raise FormatError(f"{path.name}: holds neither a LoRA nor learned tokens; choose another file")
    return Personalization(path.name, deltas, tokens, tuple(embeddings), settings)


def _tokens(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: PersonalizationSettings
) -> tuple[list[LearnedEmbedding], dict[str, str]]:
    """The learned tokens, and the initializer of each trigger where one is known."""
    triggers = [token.trigger for token in settings.tokens]
    declared = list(stored_tokens(metadata))
    files: Sequence[Path] = settings.embeddings
    if not files and not any(key.startswith(BUNDLE) for key in tensors):
        files = files_of_tokens(path, metadata, lambda name: _saved_with(path, name))
    embeddings = tokens_of_lora(path, tensors, metadata, files, triggers)
    for file in files:
        if file.suffix.lower() in {".safetensors", ".sft"}:
            declared += stored_tokens(read_header(file).metadata)
    return embeddings, {token.trigger: token.initializer for token in (*declared, *settings.tokens)}


def _saved_with(lora: Path, name: str) -> Path | None:
    """An embedding file beside the LoRA, or in the folder that training puts beside the LoRA's."""
    places = (lora.parent / name, lora.parent.parent / "embeddings" / name)
    return next((place for place in places if place.is_file() and place != lora), None)
