"""Prompts for Perfusion in the host: the concepts' words, and the superclass words in their place."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.errors import ConfigError
from ..models.perfusion import Concept
from ..models.tokens import split_prompt
from .guiding import Conditioning
from .learned_tokens import encoder_widths, knows
from .rank_one_edits import TAG, TAG_OF, GatedConcept

_NUMBER = re.compile(r"\{(\d{1,9})\}")


def with_words(prompt: str, concepts: Sequence[GatedConcept]) -> str:
    """A prompt in which {1}, {2} … stand for the concepts' words; ConfigError for a number that no concept has."""

    def word(match: re.Match[str]) -> str:
        number = int(match[1])
        if not 1 <= number <= len(concepts):
            raise ConfigError(
                f"the prompt asks for concept {{{number}}}, {len(concepts)} are loaded, counted from {{1}}; write "
                "another number, or chain another Load Perfusion Concept"
            )
        return concepts[number - 1].concept.trigger

    return _NUMBER.sub(word, prompt)


def encode(clip, prompt: str, concepts: Sequence[GatedConcept], *, global_locking: bool) -> Conditioning:
    """A prompt's conditioning; with global locking it also carries the encoding that keys are to see.

    Args:
        clip: the host's CLIP that knows the concepts' words.
        concepts: those that lock keys to their superclass, where the prompt names them.

    Raises:
        ConfigError: the prompt names a concept that the CLIP does not know, or, with global locking, one whose
            superclass word does not fit in its place.
    """
    named = [gated.concept for gated in concepts if 0 in split_prompt(prompt, [gated.concept.trigger])]
    for concept in named:
        if not knows(clip, concept.embedding, concept.name):
            raise ConfigError(
                f"the CLIP does not know {concept.trigger} of {concept.name}; connect the CLIP that Apply Perfusion "
                "returns for these concepts"
            )
    tokens = clip.tokenize(prompt)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if not global_locking or not named:
        return conditioning
    superclass = clip.encode_from_tokens_scheduled(_with_superclasses(clip, tokens, named))
    return [
        [embeds, {**options, TAG: keys, TAG_OF: embeds}]
        for (embeds, options), (keys, _) in zip(conditioning, superclass, strict=True)
    ]


def _with_superclasses(clip, tokens: dict[str, list], concepts: Sequence[Concept]) -> dict[str, list]:
    """The same tokens with each concept's rows replaced, position by position."""
    widths = encoder_widths(clip)
    learned = [(concept, concept.embedding.fit(widths, concept.name)) for concept in concepts]
    replaced: dict[str, list] = {}
    for key, blocks in tokens.items():
        name = f"clip_{key}"
        tokenizer = getattr(clip.tokenizer, name)
        rows = [
            (row, word)
            for concept, known in learned
            for row, word in zip(known[name], _words(tokenizer, concept, len(known[name])), strict=True)
        ]

        def swap(entry: tuple, rows=rows) -> tuple:
            token, *rest = entry
            if isinstance(token, Tensor):
                for row, word in rows:
                    if token.shape == row.shape and torch.equal(token.cpu(), row.to(token.dtype)):
                        return (word, *rest)
            return entry

        replaced[key] = [[swap(entry) for entry in block] for block in blocks]
    return replaced


def _words(tokenizer: Any, concept: Concept, rows: int) -> list[int]:
    """A token id of the superclass for each of the concept's rows; a shorter word ends in its last token again."""
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
