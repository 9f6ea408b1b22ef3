"""Prompts in which one word stands for the person that the encoder sees, another in every row."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...models.tokens import LearnedToken
from ..text import LearnedTokenEmbedding, PromptEmbeds, PromptEncoder
from .data import TARGET_WORD


class WordPrompts:
    """Text encoders that read ``<s*>`` as an embedding given for each row, with gradient to it.

    The authors replace another id than the word's, so that their option changes nothing; here it is the word's.
    """

    def __init__(self, text: PromptEncoder, tokenizer):
        """Take over the encoders of ``text``."""
        token = LearnedToken(TARGET_WORD, "face")  # only its id matters, behind the vocabulary's
        self._text = PromptEncoder(text.family, text.encoders, tokenizer, (token,), context=False)
        self._rows: tuple[Tensor, ...] = ()
        self.widths = []
        for place, embedding in enumerate(self._text.embeddings.values()):
            self.widths.append(embedding.weight.shape[1])
            embedding.register_forward_hook(self._filled(place))

    def _filled(self, place: int) -> Callable[..., Tensor]:
        def hook(module: LearnedTokenEmbedding, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            here = (inputs[0] >= len(module.weight)).unsqueeze(-1)
            return torch.where(here, self._rows[place].to(output.dtype).unsqueeze(1), output)

        return hook

    def __call__(self, prompts: Sequence[str], words: Sequence[Tensor]) -> PromptEmbeds:
        """Args: words: for each text encoder, (prompts, width)."""
        self._rows = tuple(words)
        try:
            return self._text.encode(prompts)
        finally:
            self._rows = ()
