"""What pictures are shown with while a concept is trained: templates, or their own captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from ...models.errors import ConfigError
from ...models.tokens import LearnedToken, replace_triggers
from ..dataset import Dataset
from ..order import Draw
from ..ranks import Ranks

TEMPLATES = (
    "a photo of a {}",
    "a good photo of a {}",
    "the photo of a {}",
    "a good photo of the {}",
    "image of a {}",
    "image of the {}",
    "A photograph of {}",
    "A {} shown in a photo",
    "A photo of {}",
)
"""The authors' templates (perfusion/dataset.py)."""


def read_templates(text: str) -> tuple[str, ...]:
    """Templates from lines of text, the authors' for ''; ConfigError where the word has no place, or several."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.count("{}") != 1:
            raise ConfigError(
                f"the template {line!r} has {line.count('{}')} places for the word; write {{}} in it once, as in "
                "'a photo of a {}'"
            )
    return tuple(lines) or TEMPLATES


@dataclass(frozen=True)
class Prompt:
    """A prompt with the concept's word, and with the superclass word in its place."""

    text: str
    superclass: str

    @classmethod
    def of(cls, text: str, token: LearnedToken) -> Self:
        """The prompt that names the word; its initializer is the superclass."""
        return cls(text, replace_triggers(text, {token.trigger: token.initializer}))


def all_prompts(dataset: Dataset, token: LearnedToken, templates: Sequence[str] | None) -> list[Prompt]:
    """Templates in their order or, where they are None, the captions in the pictures' order."""
    if templates is None:
        return [Prompt.of(example.caption, token) for example in dataset.examples]
    return [Prompt.of(template.replace("{}", token.trigger), token) for template in templates]


class PromptDraws:
    """The prompt of every picture of a batch; templates are drawn alike on every rank, which keeps its own."""

    def __init__(
        self,
        dataset: Dataset,
        token: LearnedToken,
        templates: Sequence[str] | None,
        generator: torch.Generator,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        """Args: templates: None takes the pictures' own captions."""
        self.all = all_prompts(dataset, token, templates)
        self._drawn, self._generator = templates is not None, generator
        self._count = batch_size * ranks.count
        self._mine = slice(batch_size * ranks.index, batch_size * (ranks.index + 1))

    def next(self, draws: Sequence[Draw]) -> list[Prompt]:
        """Prompts for the pictures that were drawn for this rank."""
        if not self._drawn:
            return [self.all[draw.example] for draw in draws]
        numbers = torch.randint(0, len(self.all), (self._count,), generator=self._generator)
        return [self.all[number] for number in numbers[self._mine].tolist()]

    def fixed(self, captions: Sequence[int]) -> list[Prompt]:
        """Prompts for an evaluation, which asks for captions by the numbers of their pictures."""
        return [self.all[number % len(self.all)] for number in captions]
