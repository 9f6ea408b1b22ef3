"""Prompts to conditioning: CLIP text encoders as each family uses them, with learned tokens in their vocabulary."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.errors import ConfigError, DatasetError
from ..models.families import EncoderSlot, Family
from ..models.tokens import LearnedToken, check_distinct, random_rows, repeat_to_rows, split_prompt
from .dataset import check_tokens_are_new

LENGTH = 77
"""Ids per prompt, start and end included."""


@dataclass(frozen=True)
class PromptEmbeds:
    """What prompts become."""

    embeds: Tensor
    """(prompts, 77, dim), for the UNet's cross-attention."""
    pooled: Tensor | None = None
    """(prompts, dim) for SDXL, None otherwise."""

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "PromptEmbeds":
        """Some of the prompts, in any order and with repetition."""
        return PromptEmbeds(self.embeds[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PromptEmbeds":
        return PromptEmbeds(
            self.embeds.to(device, dtype), None if self.pooled is None else self.pooled.to(device, dtype)
        )

    @classmethod
    def join(cls, parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Several batches as one."""
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return cls(torch.cat([part.embeds for part in parts]), pooled)


class LearnedTokenEmbedding(nn.Module):
    """A frozen embedding table, followed by learned rows with the ids after its last one.

    The table itself carries no gradient. Rows that a norm of gradients must cover as if the whole table
    were trained are given again as ``context``: they take part in the forward pass with the table's own
    values, so they receive the gradient the table's rows would, and nobody steps them.
    """

    def __init__(self, weight: Tensor, learned: Tensor, context_ids: Sequence[int] = ()):
        """Build the module on the table's device.

        Args:
            weight: (vocabulary, dim), the frozen table.
            learned: (rows, dim), starting values of the learned rows.
            context_ids: distinct ids of the table.
        """
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.learned = nn.Parameter(learned.detach().to(weight.device, torch.float32, copy=True))
        ids = torch.tensor(list(context_ids), dtype=torch.long, device=weight.device)
        self.context = nn.Parameter(self.weight[ids].to(torch.float32, copy=True))
        places = torch.full((len(weight) + len(learned),), -1, device=weight.device)
        places[ids] = torch.arange(len(ids), device=weight.device)
        places[len(weight) :] = torch.arange(len(learned), device=weight.device) + len(ids)
        self.register_buffer("places", places, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to embeddings (…, dim) in the table's dtype."""
        places = self.places[ids]
        leaves = torch.cat([self.context, self.learned]).to(self.weight.dtype)
        fixed = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)
        return torch.where(places.unsqueeze(-1) >= 0, F.embedding(places.clamp(min=0), leaves), fixed)


def initializer_ids(token: LearnedToken, tokenizer) -> list[int]:
    """The ids that a token's rows start from; ConfigError when its initializer has none."""
    # verbose=False: the length is our own concern; an unset one would be reported twice.
    ids = tokenizer(token.initializer, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError(
            f"token {token.trigger} starts from {token.initializer!r}, which has no tokens; "
            "give a word such as dog, or '' to start from noise"
        )
    return ids


def check_tokens(tokens: Sequence[LearnedToken], tokenizer) -> None:
    """Raise ConfigError when a token is an ordinary word already, or starts from nothing; needs no model."""
    if tokens:
        check_tokens_are_new(tokens, tokenizer.get_vocab())
    for token in tokens:
        if token.initializer:
            initializer_ids(token, tokenizer)


def refuse_cut_initializers(tokens: Sequence[LearnedToken], tokenizer) -> None:
    """Raise ConfigError for a token with fewer rows than its initializer has tokens, as the authors refuse it."""
    for token in tokens:
        if token.initializer and (count := len(initializer_ids(token, tokenizer))) > token.rows:
            raise ConfigError(
                f"token {token.trigger} starts from {token.initializer!r}, which has {count} tokens, and has "
                f"{token.rows} row(s) for them; give it {count} rows, or a shorter word"
            )


class PromptEncoder:
    """A family's text encoders with their tokenizer, reading prompts in which triggers stand for learned rows.

    Prompts are taken literally: no weights in parentheses, and one window of 75 tokens.
    """

    def __init__(
        self,
        family: Family,
        encoders: Sequence[nn.Module],
        tokenizer,
        tokens: Sequence[LearnedToken] = (),
        *,
        rows: Mapping[str, Tensor] | None = None,
        prompts: Sequence[str] = (),
        context: bool = True,
        generator: torch.Generator | None = None,
    ):
        """Take over the encoders; with ``tokens``, their embedding modules are replaced.

        Args:
            encoders: as TrainingBase.load_text_encoders gives them.
            tokenizer: transformers' CLIPTokenizer.
            tokens: learned tokens, each owning ``rows`` consecutive ids after the vocabulary.
            rows: starting values by encoder key, (sum of the tokens' rows, dim); made from the initializers
                when absent.
            prompts: prompts that training will use; they are checked for tokens that would be cut off.
            context: whether their other ids become ``context`` rows.
            generator: on the CPU, for tokens without initializer.

        Raises:
            ConfigError: a trigger used twice, an initializer without tokens, or ``rows`` of another shape.
            DatasetError: a learned token comes so late in a prompt that it is cut off.
        """
        check_distinct(tokens)
        self.family = family
        self.encoders = list(encoders)
        self.tokens = tuple(tokens)
        self.embeddings: dict[str, LearnedTokenEmbedding] = {}
        """Replaced embedding modules by encoder key; empty without learned tokens."""
        self._tokenizer = tokenizer
        self._triggers = [token.trigger for token in tokens]
        first = 0
        self._offsets: list[int] = []
        for token in tokens:
            self._offsets.append(first)
            first += token.rows
        self._warned: set[str] = set()
        if not tokens:
            return
        for slot, encoder in zip(family.encoders, self.encoders):
            table = encoder.get_input_embeddings().weight
            start = rows[slot.key] if rows is not None else self._starting_rows(table, generator)
            if tuple(start.shape) != (first, table.shape[1]):
                raise ConfigError(
                    f"learned rows for {slot.key} have the shape {tuple(start.shape)}; "
                    f"expected {(first, table.shape[1])}, use tokens trained on {family.label}"
                )
            ids = {number for prompt in prompts for number in self._complete_ids(prompt, slot)}
            known = sorted(number for number in ids if number < len(table)) if context else []
            embedding = LearnedTokenEmbedding(table, start, known)
            encoder.set_input_embeddings(embedding)
            self.embeddings[slot.key] = embedding

    @property
    def device(self) -> torch.device:
        return next(self.encoders[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].get_input_embeddings().weight.dtype

    def to(self, device: torch.device | str) -> "PromptEncoder":
        for encoder in self.encoders:
            encoder.to(device)
        return self

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The trained leaves by encoder key, (rows, dim) float32."""
        return {key: embedding.learned for key, embedding in self.embeddings.items()}

    @property
    def context(self) -> dict[str, nn.Parameter]:
        """The leaves that only a norm of gradients asks for, by encoder key, (known ids, dim) float32."""
        return {key: embedding.context for key, embedding in self.embeddings.items()}

    def table(self, key: str) -> Tensor:
        """The frozen embedding table of an encoder, (vocabulary, dim)."""
        index = [slot.key for slot in self.family.encoders].index(key)
        return self.encoders[index].get_input_embeddings().weight

    def token_ids(self, prompt: str, slot: EncoderSlot) -> list[int]:
        """A prompt's 77 ids for one encoder: start, at most 75 tokens, end, padding.

        Warns, once a prompt, when there are more than 75.
        """
        vocabulary = len(self.table(slot.key))
        ids: list[int] = []
        for piece in split_prompt(prompt, self._triggers):
            if isinstance(piece, str):
                ids += self._word_ids(piece)
            else:
                first = vocabulary + self._offsets[piece]
                ids += range(first, first + self.tokens[piece].rows)
        if len(ids) > LENGTH - 2 and prompt not in self._warned:
            self._warned.add(prompt)
            warnings.warn(
                f"a caption has {len(ids)} tokens, of which {LENGTH - 2} are read: {prompt[:60]!r}…; shorten it",
                stacklevel=2,
            )
        ids = [self._tokenizer.bos_token_id, *ids[: LENGTH - 2], self._tokenizer.eos_token_id]
        pad = self._tokenizer.eos_token_id if slot.pad_with_end else 0
        return ids + [pad] * (LENGTH - len(ids))

    def _complete_ids(self, prompt: str, slot: EncoderSlot) -> list[int]:
        """A training prompt's ids; DatasetError when a learned token of it is beyond those that are read."""
        ids, vocabulary = self.token_ids(prompt, slot), len(self.table(slot.key))
        for index in {piece for piece in split_prompt(prompt, self._triggers) if isinstance(piece, int)}:
            token, first = self.tokens[index], vocabulary + self._offsets[index]
            if not set(range(first, first + token.rows)) <= set(ids):
                raise DatasetError(
                    f"token {token.trigger} is not among the first {LENGTH - 2} tokens of the caption "
                    f"{prompt[:60]!r}…, which are all that is read; shorten the caption or move the token forward"
                )
        return ids

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Conditioning for a batch of prompts, with gradient to the learned rows and to any adapters."""
        for leaf in (*self.learned.values(), *self.context.values()):
            leaf.requires_grad_(True)  # attaching a LoRA to an encoder freezes all that the LoRA did not bring
        hidden, pooled = [], None
        for slot, encoder in zip(self.family.encoders, self.encoders):
            ids = torch.tensor([self.token_ids(prompt, slot) for prompt in prompts], device=self.device)
            # An SD2.1 encoder comes without its last layer, so its "penultimate" layer is its output too.
            last = slot.final_norm
            output = encoder(input_ids=ids, output_hidden_states=not last)
            hidden.append(output.last_hidden_state if last else output.hidden_states[-2])
            if self.family.size_conditioning and encoder is self.encoders[-1]:
                pooled = output.text_embeds
        return PromptEmbeds(torch.cat(hidden, dim=-1), pooled)

    @torch.no_grad()
    def encode_frozen(self, prompts: Sequence[str], batch_size: int = 8) -> PromptEmbeds:
        """Conditioning without gradient, computed on the encoders' device in batches and kept on the CPU."""
        batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
        return PromptEmbeds.join([self.encode(batch).to("cpu") for batch in batches])

    def _word_ids(self, text: str) -> list[int]:
        # verbose=False: the length is our own concern; an unset one would be reported twice.
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _starting_rows(self, table: Tensor, generator: torch.Generator | None) -> Tensor:
        table = table.detach().float()
        parts = []
        for token in self.tokens:
            if token.initializer == "":
                parts.append(random_rows(torch.randn(token.rows, table.shape[1], generator=generator), table.cpu()))
                continue
            ids = initializer_ids(token, self._tokenizer)
            parts.append(repeat_to_rows(table[ids].cpu(), token.rows))
        return torch.cat(parts)
