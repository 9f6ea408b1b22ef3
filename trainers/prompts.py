"""What training calls the pictures it draws: their own captions, or sentences from templates around their tokens."""

from collections.abc import Sequence
from typing import Literal

import torch

from ..models.errors import ConfigError
from ..models.templates import templates
from .captions import tokens_in
from .dataset import Dataset
from .order import Draw
from .ranks import Ranks

PromptSource = Literal["captions", "object", "style"]


class Prompts:
    """The prompts of a dataset's examples."""

    def __init__(self, source: PromptSource, dataset: Dataset, class_word: str = "") -> None:
        """Args: class_word: what follows every token in a template, such as dog; empty leaves the token alone.

        Raises:
            ConfigError: templates for a dataset without tokens.
        """
        if source != "captions" and not dataset.tokens:
            raise ConfigError(
                f"prompts from {source} templates name a token, and the dataset has none; add one, or choose captions"
            )
        triggers = [token.trigger for token in dataset.tokens]
        self._choices: list[list[str]] = []
        """By example."""
        for example in dataset.examples:
            if source == "captions":
                self._choices.append([example.caption])
                continue
            names = [
                f"{triggers[index]} {class_word}".strip() for index in sorted(tokens_in(example.caption, triggers))
            ]
            self._choices.append([template.format(" and ".join(names)) for template in templates(source)])

    @property
    def all(self) -> list[str]:
        """Every prompt that there may be."""
        return list(dict.fromkeys(prompt for choices in self._choices for prompt in choices))

    def draw(self, draws: Sequence[Draw], generator: torch.Generator, ranks: Ranks) -> list[str]:
        """One prompt for each of this rank's draws; the generators of all ranks advance alike."""
        chances = torch.rand(len(draws) * ranks.count, generator=generator).tolist()
        mine = chances[len(draws) * ranks.index :][: len(draws)]
        choices = [self._choices[draw.example] for draw in draws]
        return [prompts[min(int(chance * len(prompts)), len(prompts) - 1)] for prompts, chance in zip(choices, mine)]

    def fixed(self, example: int) -> str:
        """The prompt that evaluations take: every example has another template."""
        choices = self._choices[example]
        return choices[example % len(choices)]
