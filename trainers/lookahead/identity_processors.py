"""diffusers' attention layers with a reference and an identity, by what one forward pass is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...models.lookahead import add_adapter, attention, shared_attention
from ...models.lookahead.encoder_parts import KeyValueCopy

KeysValues = Mapping[str, tuple[Tensor, Tensor]]
"""Transformer block -> keys and values for its attention, each (batch or 1, tokens, heads * dim)."""


@dataclass(eq=False)
class AttentionPass:
    """One forward pass's part in attention: an argument of every layer, so that a recomputation gets it again."""

    copies: Mapping[str, tuple[KeyValueCopy, KeyValueCopy]] = field(default_factory=dict)
    """Block -> how keys and values of a reference are made."""
    captured: dict[str, tuple[Tensor, Tensor]] | None = None
    """Where they go; None throws them away."""
    reference: KeysValues = field(default_factory=dict)
    adapter: KeysValues = field(default_factory=dict)
    adapter_scale: float | Tensor = 1.0


class IdentityProcessor:
    """An attention processor that does what the one before it did, unless the pass gives it more."""

    def __init__(self, block: str, plain: Callable, attend: Callable[..., Tensor | None]):
        """Build the processor.

        Args:
            block: transformer block that the attention belongs to.
            plain: the processor before.
            attend: self_attention or cross_attention.
        """
        self.block, self.plain, self.attend = block, plain, attend

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        identity: AttentionPass | None = None,
    ) -> Tensor:
        attended = None
        if identity is not None:
            attended = self.attend(attn, hidden_states, encoder_hidden_states, self.block, identity)
        if attended is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)
        projection, dropout = attn.to_out
        return dropout(projection(attended))


def self_attention(attn: Any, x: Tensor, context: None, block: str, given: AttentionPass) -> Tensor | None:
    """attn1: captures a reference's keys and values, or looks at them; x is the block's normalised input.

    Returns:
        What the output projection gets, (batch, tokens, heads * dim); None where plain attention goes on.
    """
    if block in given.copies:
        k, v = (_copied(to, copy, x) for to, copy in zip((attn.to_k, attn.to_v), given.copies[block], strict=True))
        if given.captured is not None:
            given.captured[block] = k, v
    if block not in given.reference:
        return None
    return shared_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x), *given.reference[block], attn.heads)


def cross_attention(attn: Any, x: Tensor, context: Tensor, block: str, given: AttentionPass) -> Tensor | None:
    """attn2: adds the identity's attention to the prompt's. Returns as self_attention."""
    if block not in given.adapter:
        return None
    q = attn.to_q(x)
    attended = attention(q, attn.to_k(context), attn.to_v(context), attn.heads)
    k, v = (tensor.to(q.dtype) for tensor in given.adapter[block])
    return add_adapter(attended, q, k, v, attn.heads, scale=given.adapter_scale)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in the dtype of the weight, which may be trained in float32 beside a smaller UNet."""
    return F.linear(x.to(weight.dtype), weight)


def _copied(projection: nn.Module, copy: KeyValueCopy, x: Tensor) -> Tensor:
    """Keys or values by a copy of attn1's projection, which the LoRA of the encoder's pass does not touch."""
    if isinstance(copy, Tensor):
        return linear(x, copy)
    own = getattr(projection, "base_layer", projection)(x)
    return own if copy is None else (own + copy.linear(x.to(copy.down.dtype))).to(own.dtype)
