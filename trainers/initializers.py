"""Which word a learned token starts from: the one most or least like its pictures by CLIP, or any at random."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models.errors import ConfigError, DatasetError
from ..models.templates import templates
from .captions import derive_base, tokens_in
from .dataset import Dataset
from .scoring import ClipJudge, load_clip_judge
from .tokenizer import load_tokenizer

Strategy = Literal["best", "worst", "random"]
TEMPLATES = 4
"""Sentences that a word is tried in; the authors draw as many."""
AT_ONCE = 256
"""Sentences that CLIP reads at a time."""
_WORD = re.compile("[a-z]{2,}</w>")


@dataclass(frozen=True)
class Choice:
    """The word for one token."""

    trigger: str
    word: str
    ranking: tuple[tuple[str, float], ...]
    """Words and their similarity to the token's pictures, the highest first; empty where the word was drawn."""


@dataclass(frozen=True, kw_only=True)
class InitializerSettings:
    """How the words that tokens start from are chosen; they replace the dataset's own."""

    strategy: Strategy = "best"
    """Most or least like the pictures of the token, or any word."""
    clip: Path | None = None
    """Folder with a CLIP in transformers' layout, for best and worst."""
    words: tuple[str, ...] = ()
    """Candidates; empty takes all words that are a single token of CLIP's vocabulary, which takes minutes on a GPU."""
    seed: int = 0
    """Of the random word, and of the sentences that words are tried in."""

    def __post_init__(self) -> None:
        if self.strategy not in ("best", "worst", "random"):
            raise ConfigError(f"the initializer's strategy must be best, worst or random, got {self.strategy!r}")
        if self.strategy != "random" and self.clip is None:
            raise ConfigError(
                f"the initializer's strategy {self.strategy} needs a CLIP; give the folder of one, such as "
                "openai/clip-vit-base-patch32, or choose random"
            )

    def open(self, tokenizer: Path | None = None) -> ClipJudge | None:
        """The CLIP that ranks words; None where none is needed. Args and errors as for load_clip_judge."""
        return None if self.strategy == "random" else load_clip_judge(self.clip, tokenizer)


def single_token_words(tokenizer: Any) -> list[str]:
    """Words of at least two plain letters that are one token of a CLIP tokenizer, in the vocabulary's order.

    The authors also try parts of words and signs (yandex-research/DVAR, clip_scores.py), which make no sentence.
    """
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [entry.removesuffix("</w>") for entry, _ in entries if _WORD.fullmatch(entry)]


def choose_initializers(
    dataset: Dataset,
    settings: InitializerSettings,
    *,
    judge: ClipJudge | None,
    tokenizer: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Dataset, list[Choice]]:
    """A copy of the dataset whose tokens start from the chosen words, and what was chosen.

    A token's pictures are those whose captions name it. Base captions that were made from the old words are made
    from the new ones.

    Args:
        judge: as ``settings.open`` gives it, on the device to be used.
        tokenizer: folder of the tokenizer whose words are drawn at random; None as for load_tokenizer.
        advance: told how many of how many sentences were read; may raise to end the work.

    Raises:
        ConfigError: the dataset has no tokens.
    """
    if not dataset.tokens:
        raise ConfigError("the dataset has no tokens, so there is no word to start from; give one, such as <dog>")
    words = list(dict.fromkeys(word.strip() for word in settings.words if word.strip()))
    reader = load_tokenizer(tokenizer if judge is None else judge.tokenizer)
    words = words or single_token_words(reader)
    draws = random.Random(settings.seed)
    sentences = draws.sample(templates("object"), TEMPLATES)
    described = None if judge is None else _describe(judge, reader, words, sentences, advance)
    triggers, choices = [token.trigger for token in dataset.tokens], []
    for index, token in enumerate(dataset.tokens):
        if described is None:
            choices.append(Choice(token.trigger, draws.choice(words), ()))
            continue
        shown = [example for example in dataset.examples if index in tokens_in(example.caption, triggers)]
        scores = described @ _seen(judge, [example.picture.open().rgb for example in shown])
        order = scores.argsort(descending=True, stable=True).tolist()
        ranking = tuple((words[place], float(scores[place])) for place in order)
        choices.append(Choice(token.trigger, ranking[0 if settings.strategy == "best" else -1][0], ranking))
    return _started_from(dataset, choices), choices


@torch.no_grad()
def _describe(
    judge: ClipJudge,
    tokenizer: Any,
    words: Sequence[str],
    sentences: Sequence[str],
    advance: Callable[[int, int], None],
) -> Tensor:
    """Mean of a word's normalized embeddings in the sentences, (words, dim)."""
    texts = [sentence.format(word) for word in words for sentence in sentences]
    network, rows = judge.network, []
    longest = network.config.text_config.max_position_embeddings
    for first in range(0, len(texts), AT_ONCE):
        part = texts[first : first + AT_ONCE]
        # What fills up short sentences comes after their end, where CLIP no longer looks.
        ids = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt").input_ids
        hidden = network.text_model(input_ids=ids.to(network.device)).pooler_output
        rows.append(network.text_projection(hidden).float().cpu())
        advance(min(first + AT_ONCE, len(texts)), len(texts))
    return F.normalize(torch.cat(rows), dim=1).unflatten(0, (len(words), -1)).mean(1)


def _seen(judge: ClipJudge, pictures: Sequence[Image.Image]) -> Tensor:
    """Mean of the pictures' normalized embeddings, (dim,)."""
    rows = [judge.embed_images(pictures[first : first + 16]) for first in range(0, len(pictures), 16)]
    return F.normalize(torch.cat(rows), dim=1).mean(0)


def _started_from(dataset: Dataset, choices: Sequence[Choice]) -> Dataset:
    tokens = tuple(
        replace(token, initializer=choice.word) for token, choice in zip(dataset.tokens, choices, strict=True)
    )
    examples = []
    for example in dataset.examples:
        try:
            derived = derive_base(example.caption, dataset.tokens, example.picture.name)
        except DatasetError:  # a token had no word: the base caption was given
            derived = None
        if example.base_caption == derived:
            example = replace(example, base_caption=derive_base(example.caption, tokens, example.picture.name))
        examples.append(example)
    return replace(dataset, tokens=tokens, examples=tuple(examples))
