"""Several Custom Diffusions as one, without training: the constrained merge (arXiv 2212.04488)."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.custom_diffusion import (
    FORMAT,
    CustomDiffusion,
    is_trained,
    read_custom_diffusion,
    write_custom_diffusion,
)
from ...models.dvar.merging import ConstrainedMerge
from ...models.errors import ConfigError, DatasetError, IncompatibleModelError
from ...models.formats import describe, refuse_taken
from ...models.learned_embeddings import LearnedEmbedding
from ...models.templates import ordinary_captions
from ...models.tokens import LearnedToken, replace_triggers, split_prompt
from ..base import TrainingBase, open_base
from ..config import build
from ..outcome import CANCELLED
from ..output import OutputPlace, narrowed
from ..progress import Cancelled, Progress, SilentProgress
from ..ranks import Ranks
from ..settings import pick_device
from ..text import PromptEncoder
from .merge_config import MergeRun

MOST_CAPTIONS = 200
"""Ordinary captions that are read, as the authors do."""


@dataclass(frozen=True)
class Concept:
    """A file to merge, read."""

    name: str
    """Of the file."""
    changed: CustomDiffusion
    phrase: str
    style: bool = False

    @property
    def prompts(self) -> tuple[str, str]:
        """What precedes the phrase in the prompts whose reading is kept (the authors' composenW.py)."""
        return "", "painting in the style of" if self.style else "photo of a"


def read_concept(path: Path, phrase: str = "") -> Concept:
    """Read a file to merge.

    Args: phrase: what names it in prompts; empty takes the file's words with the class they were trained with.

    Raises:
        FormatError: it is no Custom Diffusion.
        ConfigError: there is nothing to name it by, the phrase lacks its words, or more was trained than keys and
            values.
    """
    changed = read_custom_diffusion(path)
    if others := [name for name in changed.names if not is_trained(name)]:
        raise ConfigError(
            f"{path.name} changes {others[0]}, and only keys and values can be merged; train it with trained = "
            "keys_values"
        )
    config = _config(changed)
    words = " and ".join(f"{token.trigger} {config.get('class_word', '')}".strip() for token in changed.tokens)
    if not (phrase.strip() or words):
        raise ConfigError(f"{path.name} brings no word; write the phrase that names what it has learned, such as cat")
    phrase = phrase.strip() or words
    triggers = [token.trigger for token in changed.tokens]
    if triggers and not any(isinstance(piece, int) for piece in split_prompt(phrase, triggers)):
        raise ConfigError(f"the phrase {phrase!r} lacks the word of {path.name}; write {' or '.join(triggers)} in it")
    return Concept(path.name, changed, phrase, config.get("prompts") == "style")


def _config(changed: CustomDiffusion) -> dict[str, Any]:
    """The settings of its training; empty for files of other tools."""
    try:
        found = json.loads(changed.metadata.get("personalize.config", ""))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def merge(
    concepts: Sequence[Concept],
    base: TrainingBase,
    place: OutputPlace,
    *,
    captions: Sequence[str] = (),
    device: torch.device,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
    before_loading: Callable[[], None] | None = None,
) -> tuple[Path, tuple[str, ...]]:
    """Write one file in which each concept's words are read as in its own, and ordinary captions as in the base.

    A word that two files share is numbered in the later ones, as in <new1> and <new12>.

    Args:
        captions: ordinary ones; empty takes built-in ones.

    Returns:
        The file, and the words to use in prompts.

    Raises:
        ConfigError: there are fewer than two concepts, or a file of that name exists.
        IncompatibleModelError: a concept was trained on another family than the base.
        Cancelled: the user cancelled; nothing is written.
    """
    if len(concepts) < 2:
        raise ConfigError(f"merging needs two concepts or more, and there is {len(concepts)}; add a file")
    progress = progress or SilentProgress()
    refuse_taken(place.lora_path, overwrite=place.overwrite)
    concepts = _distinct(concepts)
    shapes = {name: tuple(weight.shape) for name, weight in base.unet.build().state_dict().items()}
    for concept in concepts:
        _check_fit(concept, shapes)
    if before_loading is not None:
        before_loading()
    progress.report(0, 1, "encoding captions")
    with torch.no_grad():
        solution, words, tokens = _read_words(concepts, base, captions or ordinary_captions(), device)
        own = base.load_unet(torch.float16, "cpu").state_dict()
        weights = {}
        names = sorted(set.union(*(concept.changed.names for concept in concepts)))
        for done, name in enumerate(names, start=1):
            if progress.cancelled():
                raise Cancelled("cancelled while merging")
            values = [
                rows @ concept.changed.weight(name, own[name].float()).T
                for concept, rows in zip(concepts, words, strict=True)
            ]
            merged = solution.weight(own[name].float(), torch.cat(values))
            weights[name] = narrowed(merged, torch.float16)
            progress.report(done, len(names), f"merging weights: {done} of {len(names)}")
    learned = [LearnedToken(token.trigger, "", len(next(iter(token.rows.values())))) for token in tokens]
    entries = describe(
        FORMAT,
        family=base.family.name,
        method="custom-diffusion",
        title=place.name,
        tokens=learned,
        config={"merged": [concept.name for concept in concepts], "phrases": [concept.phrase for concept in concepts]},
        kind="custom-diffusion",
        extra=metadata,
    )
    path = write_custom_diffusion(
        place.lora_path, CustomDiffusion(weights, tuple(tokens)), entries, overwrite=place.overwrite
    )
    return path, tuple(token.trigger for token in tokens)


def _distinct(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts with words of their own."""
    taken: set[str] = set()
    result = []
    for concept in concepts:
        names = {}
        for token in concept.changed.tokens:
            name, number = token.trigger, 2
            while name.lower() in taken:
                name, number = f"{token.trigger[:-1]}{number}>", number + 1
            taken.add(name.lower())
            names[token.trigger] = name
        tokens = tuple(replace(token, trigger=names[token.trigger]) for token in concept.changed.tokens)
        changed = replace(concept.changed, tokens=tokens)
        result.append(replace(concept, changed=changed, phrase=replace_triggers(concept.phrase, names)))
    return result


def _check_fit(concept: Concept, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise IncompatibleModelError when a concept's weights are not those of a UNet of these shapes."""
    changed = concept.changed
    found = {name: tuple(weight.shape) for name, weight in changed.weights.items()}
    found |= {name: (change.up.shape[0], change.down.shape[1]) for name, change in changed.changes.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if is_trained(name) and found.get(name) != shapes.get(name):
            raise IncompatibleModelError(
                f"{concept.name}: {name} of size {found.get(name)} does not fit the base model's {shapes.get(name)}; "
                "merge files that were trained on its family"
            )


def _read_words(
    concepts: Sequence[Concept], base: TrainingBase, captions: Sequence[str], device: torch.device
) -> tuple[ConstrainedMerge, list[Tensor], list[LearnedEmbedding]]:
    """The solution, encodings of each concept's words (words, dim), and all tokens with their encoders named."""
    encoders = base.load_text_encoders(torch.float32, device)
    widths = {
        slot.key: encoder.get_input_embeddings().weight.shape[1]
        for slot, encoder in zip(base.family.encoders, encoders, strict=True)
    }
    tokens = [
        replace(token, rows=token.fit(widths, concept.name)) for concept in concepts for token in concept.changed.tokens
    ]
    learned = [LearnedToken(token.trigger, "", len(next(iter(token.rows.values())))) for token in tokens]
    rows = {key: torch.cat([token.rows[key].float() for token in tokens]) for key in widths} if tokens else None
    tokenizer, slot = base.tokenizer(), base.family.encoders[0]
    encoder = PromptEncoder(base.family, encoders, tokenizer, learned, rows=rows, context=False)

    def end(prompt: str) -> int:
        return encoder.token_ids(prompt, slot).index(tokenizer.eos_token_id)

    def encodings(prompts: Sequence[str], before: Sequence[str]) -> Tensor:
        """Of the prompts' tokens with the end token, without the start token and those of what is before."""
        embeds = encoder.encode_frozen(prompts).embeds
        parts = zip(embeds, prompts, before, strict=True)
        return torch.cat([rows[end(first) : end(prompt) + 1] for rows, prompt, first in parts])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a caption has")  # of long ones the beginning is read
        ordinary = encodings(captions[:MOST_CAPTIONS], [""] * len(captions[:MOST_CAPTIONS]))
    words = [
        encodings([f"{before} {concept.phrase}".strip() for before in concept.prompts], concept.prompts)
        for concept in concepts
    ]
    return ConstrainedMerge(ordinary, torch.cat(words)), words, tokens


def read_captions(path: Path) -> list[str]:
    """Captions of a text file, one a line; DatasetError when there are none."""
    try:
        lines = [" ".join(line.split()) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path.name}: could not be read as text in UTF-8 ({error}); check the file") from error
    if not any(lines):
        raise DatasetError(f"{path.name}: holds no captions; write one a line")
    return [line for line in lines if line]


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``merge-custom-diffusion`` recipe; values as in merge.example.toml."""
    settings = build(MergeRun, values)
    if ranks.count > 1:
        raise ConfigError("concepts are merged in one process; start it without accelerate launch")
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    concepts = [read_concept(concept.file, concept.phrase) for concept in settings.concepts]
    try:
        path, words = merge(
            concepts,
            base,
            settings.output.place(),
            captions=read_captions(settings.captions) if settings.captions else (),
            device=pick_device(settings.device),
            progress=progress,
        )
    except Cancelled:
        return CANCELLED
    print(f"\nsaved {path}, which knows {', '.join(words) or 'no word'}")
    return 0
