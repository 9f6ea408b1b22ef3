"""Prompts for Perfusion in the host: the concepts' words, and the superclass words in their place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.errors import ConfigError
from ..models.perfusion import Concept
from .guiding import Conditioning
from .rank_one_edits import TAG, GatedConcept


def with_words(prompt: str, concepts: Sequence[GatedConcept]) -> str:
    """A prompt in which {1}, {2} … stand for the concepts' words; ConfigError for a number too large."""
    for number, gated in enumerate(concepts, start=1):
        prompt = prompt.replace(f"{{{number}}}", gated.concept.trigger)
    rest = prompt.partition("{")[2].partition("}")[0]
    if rest.isdigit():
        raise ConfigError(
            f"the prompt asks for concept {{{rest}}}, {len(concepts)} are loaded; chain another Load Perfusion Concept"
        )
    return prompt


def encode(clip, prompt: str, concepts: Sequence[GatedConcept], *, global_locking: bool) -> Conditioning:
    """A prompt's conditioning; with global locking it also carries the encoding that keys are to see.

    Args:
        clip: the host's CLIP that knows the concepts' words.
        concepts: those that lock keys to their superclass.

    Raises:
        ConfigError: global locking with a concept whose superclass word does not fit in its place.
    """
    tokens = clip.tokenize(prompt)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if not global_locking:
        return conditioning
    locked = _with_superclasses(clip, tokens, [gated.concept for gated in concepts])
    if locked is None:
        return conditioning
    superclass = clip.encode_from_tokens_scheduled(locked)
    return [
        [embeds, {**options, TAG: keys}] for (embeds, options), (keys, _) in zip(conditioning, superclass, strict=True)
    ]


def _with_superclasses(clip, tokens: dict[str, list], concepts: Sequence[Concept]) -> dict[str, list] | None:
    """The same tokens with each concept's rows replaced, position by position; None where there are none."""
    found = False
    replaced: dict[str, list] = {}
    for key, blocks in tokens.items():
        tokenizer = getattr(clip.tokenizer, f"clip_{key}")
        rows = [
            (row, word)
            for concept in concepts
            for row, word in zip(concept.embedding.rows[f"clip_{key}"], _words(tokenizer, concept, key), strict=True)
        ]

        def swap(entry: tuple, rows=rows) -> tuple:
            nonlocal found
            token, *rest = entry
            if isinstance(token, Tensor):
                for row, word in rows:
                    if token.shape == row.shape and torch.equal(token.cpu(), row.to(token.dtype)):
                        found = True
                        return (word, *rest)
            return entry

        replaced[key] = [[swap(entry) for entry in block] for block in blocks]
    return replaced if found else None


def _words(tokenizer: Any, concept: Concept, key: str) -> list[int]:
    """A token id of the superclass for each of the concept's rows; a shorter word ends in its last token again."""
    rows = len(concept.embedding.rows[f"clip_{key}"])
    if not concept.superclass:
        raise ConfigError(
            f"{concept.name} does not say which word it stands in for, so its keys cannot be locked globally; switch "
            "global locking off"
        )
    ids = tokenizer.tokenizer(concept.superclass)["input_ids"][tokenizer.tokens_start : -1]
    if not 1 <= len(ids) <= rows:
        raise ConfigError(
            f"{concept.name}: the superclass {concept.superclass!r} is {len(ids)} tokens long, the concept's word "
            f"{rows}; train it with at least {len(ids)} vectors, or switch global locking off"
        )
    return ids + ids[-1:] * (rows - len(ids))
