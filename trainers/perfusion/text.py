"""The text side of Perfusion training: prompts with the word as trained so far, and where the word stands in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.families import Family
from ...models.perfusion import concept_row
from ...models.tokens import LearnedToken
from ..conditioning import Conditioning
from ..text import PromptEmbeds, PromptEncoder, initializer_ids
from .prompts import Prompt


class ConceptText:
    """Encodes prompts, and finds the row of their encoding that is the concept's."""

    def __init__(
        self,
        family: Family,
        encoders: Sequence[torch.nn.Module],
        tokenizer,
        token: LearnedToken,
        *,
        frozen: Sequence[str] = (),
    ) -> None:
        """Args:
        tokenizer: transformers' CLIPTokenizer.
        frozen: prompts without the word that the reference will be asked for.
        """
        self._encoder = PromptEncoder(family, encoders, tokenizer, [token])
        self._frozen = {text: self.encode_frozen([text]).to(self._encoder.device) for text in frozen}
        self._slot = family.encoders[0]
        self._last = token.rows - 1
        self._more = len(initializer_ids(token, tokenizer)) - 1
        self._rows: dict[str, int] = {}

    @property
    def learned(self) -> dict[str, torch.nn.Parameter]:
        """The word's rows by encoder key, (rows, dim) float32."""
        return self._encoder.learned

    def encode(self, prompts: Sequence[Prompt]) -> PromptEmbeds:
        """Encodings of the prompts with the word, with gradient to its rows."""
        return self._encoder.encode([prompt.text for prompt in prompts])

    def encode_frozen(self, texts: Sequence[str]) -> PromptEmbeds:
        """Encodings without gradient, on the CPU."""
        return self._encoder.encode_frozen(list(texts))

    def policy(self, prompts: Sequence[str], time_ids: Tensor | None) -> Conditioning:
        """Conditioning of prompts with the word as trained so far."""
        embeds = self._encoder.encode(prompts)
        return Conditioning(embeds.embeds, embeds.pooled, time_ids)

    def reference(self, prompts: Sequence[str], time_ids: Tensor | None) -> Conditioning:
        """Conditioning without gradient, of frozen prompts alone."""
        embeds = PromptEmbeds.join([self._frozen[prompt] for prompt in prompts])
        return Conditioning(embeds.embeds, embeds.pooled, time_ids)

    def rows(self, prompts: Sequence[Prompt]) -> Tensor:
        """Row of the word in each prompt, (prompts,); of several vectors the last, the only one that has read them all.

        Raises:
            DatasetError: a prompt lacks the word among the tokens that are read.
        """
        return torch.tensor([self._row(prompt.text) for prompt in prompts])

    def superclass_rows(self, prompts: Sequence[Prompt]) -> Tensor:
        """Row of the superclass in each prompt with it, (prompts,); of several tokens the last."""
        return self.rows(prompts) - self._last + self._more

    def _row(self, text: str) -> int:
        if text not in self._rows:
            ids = self._encoder.token_ids(text, self._slot)
            self._rows[text] = concept_row(ids, len(self._encoder.table(self._slot.key)) + self._last)
        return self._rows[text]
