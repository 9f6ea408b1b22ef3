"""The text side of a training: frozen encodings looked up, trained ones computed anew, tokens kept at their norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models.lora import LowRankDelta
from ..models.tokens import LearnedToken, remembered_norms, retract
from .adapters import TEXT_ATTENTION, add_lora, read_lora
from .base import TrainingBase
from .conditioning import Conditioning
from .config import Precision
from .devices import dtype_of, free_memory
from .optimizer import ParameterGroup
from .text import PromptEmbeds, PromptEncoder


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a recipe trains its text side."""

    precision: Precision
    learning_rate: float
    """Rate of the learned tokens and of the text encoders' LoRA."""
    weight_decay: float
    lora_rank: int = 0
    """Rank of a LoRA on the text encoders; 0 trains none."""
    gradient_checkpointing: bool = False
    whole_tables: bool = False
    """Clip and retract as DCO's authors do: they train whole embedding tables and restore the other rows after every
    step, so that those rows' gradients take part in the clipping norm, and keep the new rows at their first norms."""
    token_norm: Literal["row", "authors"] = "row"
    """Which norm that is for a token without initializer: its starting row's, or the table's standard deviation."""


class TextSide:
    """Turns captions into conditioning for the policy (as trained so far) and for the reference (frozen).

    Frozen prompts, and all prompts where nothing on the text side is trained, are encoded once; in the
    latter case the text encoders are released before training starts. Frozen prompts keep the encoding of the
    untouched encoders while a LoRA is trained on them, as DCO's reference model asks; its authors' code
    encodes them with the encoders as trained so far.
    """

    def __init__(
        self,
        settings: TextSettings,
        base: TrainingBase,
        tokens: Sequence[LearnedToken],
        tokenizer,
        *,
        captions: Sequence[str],
        frozen: Sequence[str] = (),
        prompts: Sequence[str] = (),
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        """Args:
        tokenizer: transformers' CLIPTokenizer.
        captions: what training will ask for.
        frozen: what the reference will be asked for; it always knows the empty prompt.
        prompts: further prompts that will be asked for, such as those of previews.
        """
        self._device = device
        encoders = base.load_text_encoders(dtype_of(settings.precision, device), device)
        self._encoder: PromptEncoder | None = PromptEncoder(
            base.family,
            encoders,
            tokenizer,
            tokens,
            prompts=captions,
            context=settings.whole_tables,
            generator=generator,
        )
        trained = bool(tokens) or settings.lora_rank > 0
        fixed = {*frozen, ""}
        if not trained:
            fixed |= {*captions, *prompts}
        self._places = {prompt: place for place, prompt in enumerate(sorted(fixed))}
        self._frozen = self._encoder.encode_frozen(list(self._places)).to(device)
        self.groups: list[ParameterGroup] = []
        self.clip_also: list[Tensor] = []
        self._tokens = tuple(tokens)
        self._norms: dict[str, Tensor] = {}
        if tokens:
            learned = self._encoder.learned
            self.groups.append(ParameterGroup("tokens", learned, settings.learning_rate, settings.weight_decay))
            if settings.whole_tables:
                self.clip_also = list(self._encoder.context.values())
                for key, leaf in learned.items():
                    self._norms[key] = _norms(leaf, tokens, self._encoder.table(key), settings.token_norm)
        self._adapted: dict[str, torch.nn.Module] = {}
        if settings.lora_rank:
            for index, encoder in enumerate(encoders):
                root = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
                lora = add_lora(encoder, settings.lora_rank, TEXT_ATTENTION, generator)
                if settings.gradient_checkpointing:
                    _checkpoint_activations(encoder)
                self.groups.append(ParameterGroup(root, lora, settings.learning_rate, settings.weight_decay))
                self._adapted[root] = encoder
        if not trained:
            self._encoder = None
            del encoders
            free_memory(device)

    def policy(self, prompts: list[str], time_ids: Tensor | None) -> Conditioning:
        """Conditioning as trained so far, with gradient."""
        embeds = self._encoder.encode(prompts) if self._encoder else self._look_up(prompts)
        return Conditioning(embeds.embeds, embeds.pooled, time_ids)

    def reference(self, prompts: list[str], time_ids: Tensor | None) -> Conditioning:
        """Conditioning for the frozen base: only frozen prompts and the empty one are known."""
        embeds = self._look_up(prompts)
        return Conditioning(embeds.embeds, embeds.pooled, time_ids)

    @torch.no_grad()
    def retract(self) -> None:
        """Bring the learned rows back to their remembered norms, where they have such."""
        for key, norms in self._norms.items():
            leaf = self._encoder.learned[key]
            leaf.copy_(retract(leaf, norms))

    def rows(self) -> dict[str, Tensor]:
        """The learned rows by encoder key; empty without learned tokens."""
        return {key: leaf.detach() for key, leaf in self._encoder.learned.items()} if self._tokens else {}

    def read_lora(self) -> dict[str, LowRankDelta]:
        """The text encoders' LoRA; empty when they are not trained."""
        return {name: delta for root, model in self._adapted.items() for name, delta in read_lora(model, root).items()}

    def _look_up(self, prompts: list[str]) -> PromptEmbeds:
        return self._frozen[[self._places[prompt] for prompt in prompts]]


def _checkpoint_activations(encoder: torch.nn.Module) -> None:
    # The second name is the one before transformers 5.
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    encoder.train()  # only then are activations recomputed; CLIP has no dropout


def _norms(leaf: Tensor, tokens: Sequence[LearnedToken], table: Tensor, which: str) -> Tensor:
    """Remembered norm of each learned row, (rows, 1)."""
    parts, first = [], 0
    for token in tokens:
        rows = leaf.detach()[first : first + token.rows]
        as_authors = which == "authors" and not token.initializer
        parts.append(remembered_norms(rows, scalar=table.float().std() if as_authors else None))
        first += token.rows
    return torch.cat(parts)
