"""Learned tokens on the host's CLIP: ``<dog>`` in any prompt stands for trained embedding rows."""

import copy
from collections.abc import Sequence

import torch
from comfy.sd1_clip import SDTokenizer
from comfy_api.latest import io
from torch import Tensor

from ..models.learned_embeddings import ENCODERS, LearnedEmbedding
from ..models.tokens import replace_triggers


def tokens_output() -> io.Output:
    """The words that a node loads: each says the same of them."""
    return io.String.Output(display_name="tokens", tooltip="The words to use in prompts, separated by commas.")


class _LearnedTokens:
    """Mixed into a copy of the host's tokenizer; ``personalize_rows`` maps lower-case triggers to (rows, dim)."""

    personalize_rows: dict[str, Tensor]

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        # The spaces let the host find the name between punctuation: "<dog>'s", "(<dog>:1.2)".
        mark = self.embedding_identifier
        words = {trigger: f" {mark}{trigger} " for trigger in self.personalize_rows}
        # Who writes "embedding:<dog>" means the same.
        text = replace_triggers(text, words).replace(f"{mark} {mark}", mark)
        return super().tokenize_with_weights(text, *args, **kwargs)

    def _try_get_embedding(self, embedding_name: str):
        name, _, rest = embedding_name.strip().partition(" ")
        rows = self.personalize_rows.get(name.lower())
        return super()._try_get_embedding(embedding_name) if rows is None else (rows, rest.strip())


def _with_tokens(tokenizer: SDTokenizer, rows: dict[str, Tensor]) -> SDTokenizer:
    taught = copy.copy(tokenizer)
    if not isinstance(tokenizer, _LearnedTokens):
        taught.__class__ = type(f"Learned{type(tokenizer).__name__}", (_LearnedTokens, type(tokenizer)), {})
    taught.personalize_rows = {**getattr(tokenizer, "personalize_rows", {}), **rows}
    if taught.embedding_directory is None:
        taught.embedding_directory = []  # None would switch embeddings off
    return taught


def encoder_widths(clip) -> dict[str, int]:
    """Embedding width of each CLIP text encoder that a CLIP holds, by clip_l, clip_g or clip_h."""
    model = clip.cond_stage_model
    encoders = {key: getattr(model, key) for key in ENCODERS if getattr(model, key, None) is not None}
    return {key: encoder.transformer.get_input_embeddings().weight.shape[1] for key, encoder in encoders.items()}


def teach(clip, embeddings: Sequence[LearnedEmbedding], name: str):
    """A clone of the CLIP that knows the tokens; the one given is untouched.

    Args:
        clip: the host's CLIP.
        embeddings: tokens with rows for all of its text encoders.
        name: file the tokens come from, for messages.

    Raises:
        IncompatibleModelError: an encoder has no rows, or rows of another width.
    """
    widths = encoder_widths(clip)
    by_encoder: dict[str, dict[str, Tensor]] = {key: {} for key in widths}
    for embedding in embeddings:
        for key, rows in embedding.fit(widths, name).items():
            by_encoder[key][embedding.trigger.lower()] = rows
    taught = clip.clone()
    taught.tokenizer = copy.copy(clip.tokenizer)
    for key, rows in by_encoder.items():
        setattr(taught.tokenizer, key, _with_tokens(getattr(clip.tokenizer, key), rows))
    return taught


def knows(clip, embedding: LearnedEmbedding, name: str) -> bool:
    """Whether a CLIP was taught this very word; IncompatibleModelError as for `teach`."""
    return all(
        (known := getattr(getattr(clip.tokenizer, key), "personalize_rows", {}).get(embedding.trigger.lower()))
        is not None
        and torch.equal(known, rows)
        for key, rows in embedding.fit(encoder_widths(clip), name).items()
    )
