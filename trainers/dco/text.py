"""The text side of DCO training: frozen encodings looked up, trained ones computed anew, tokens kept at their norms."""

import torch
from torch import Tensor

from ...models.lora import LowRankDelta
from ...models.tokens import remembered_norms, retract
from ..adapters import TEXT_ATTENTION, add_lora, read_lora
from ..base import TrainingBase
from ..conditioning import Conditioning
from ..dataset import Dataset
from ..devices import dtype_of, free_memory
from ..optimizer import ParameterGroup
from ..text import PromptEmbeds, PromptEncoder
from .config import DCOConfig


class TextSide:
    """Turns captions into conditioning for the policy (as trained so far) and for the reference (frozen).

    Base captions, and all captions where nothing on the text side is trained, are encoded once; in the
    latter case the text encoders are released before training starts. Base captions keep the encoding of the
    untouched encoders while a LoRA is trained on them, as the paper's reference model asks; the authors' code
    encodes them with the encoders as trained so far.
    """

    def __init__(
        self,
        config: DCOConfig,
        base: TrainingBase,
        dataset: Dataset,
        tokenizer,
        *,
        prompts: tuple[str, ...] = (),
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        """Args:
        tokenizer: transformers' CLIPTokenizer.
        prompts: further prompts that will be asked for, such as those of previews.
        """
        self._device = device
        encoders = base.load_text_encoders(dtype_of(config.precision, device), device)
        captions = [example.caption for example in (*dataset.examples, *dataset.class_examples)]
        self._encoder: PromptEncoder | None = PromptEncoder(
            base.family, encoders, tokenizer, dataset.tokens, prompts=captions, generator=generator
        )
        trained = bool(dataset.tokens) or config.train_text_encoder
        fixed = {example.base_caption for example in dataset.examples} | {""}
        if not trained:
            fixed |= {*captions, *prompts}
        self._places = {prompt: place for place, prompt in enumerate(sorted(fixed))}
        self._frozen = self._encoder.encode_frozen(list(self._places)).to(device)
        decay = config.weight_decay if config.text_weight_decay == -1 else config.text_weight_decay
        self.groups: list[ParameterGroup] = []
        self.clip_also: list[Tensor] = []
        self._norms: dict[str, Tensor] = {}
        if dataset.tokens:
            learned = self._encoder.learned
            self.groups.append(ParameterGroup("tokens", learned, config.text_learning_rate, decay))
            # The authors train whole embedding tables and restore the other rows after every step; those
            # rows' gradients take part in the clipping norm all the same.
            self.clip_also = list(self._encoder.context.values())
            for key, leaf in learned.items():
                self._norms[key] = _norms(leaf, dataset, self._encoder.table(key), config)
        self._adapted: dict[str, torch.nn.Module] = {}
        if config.train_text_encoder:
            for index, encoder in enumerate(encoders):
                root = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
                lora = add_lora(encoder, config.rank, TEXT_ATTENTION, generator)
                if config.gradient_checkpointing:
                    _checkpoint_activations(encoder)
                self.groups.append(ParameterGroup(root, lora, config.text_learning_rate, decay))
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
        """Conditioning for the frozen base: only base captions and the empty prompt are known."""
        embeds = self._look_up(prompts)
        return Conditioning(embeds.embeds, embeds.pooled, time_ids)

    @torch.no_grad()
    def retract(self) -> None:
        """Bring the learned rows back to their remembered norms."""
        for key, norms in self._norms.items():
            leaf = self._encoder.learned[key]
            leaf.copy_(retract(leaf, norms))

    def rows(self) -> dict[str, Tensor]:
        """The learned rows by encoder key; empty without learned tokens."""
        return {key: leaf.detach() for key, leaf in self._encoder.learned.items()} if self._norms else {}

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


def _norms(leaf: Tensor, dataset: Dataset, table: Tensor, config: DCOConfig) -> Tensor:
    """Remembered norm of each learned row, (rows, 1)."""
    parts, first = [], 0
    for token in dataset.tokens:
        rows = leaf.detach()[first : first + token.rows]
        as_authors = config.token_norm == "authors" and not token.initializer
        parts.append(remembered_norms(rows, scalar=table.float().std() if as_authors else None))
        first += token.rows
    return torch.cat(parts)
