"""Identity in attention: a reference's keys and values joined to self-attention, an adapter beside cross-attention.

Queries, keys and values are what the projections return, (batch, tokens, heads * dim).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Plain multi-head attention.

    Args:
        q: (batch, queries, heads * dim).
        k, v: (batch, keys, heads * dim).
        bias: added to the logits, broadcastable to (batch, heads, queries, keys).

    Returns:
        (batch, queries, heads * dim).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (batch, heads, tokens, dim)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return attended.transpose(1, 2).flatten(2)


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    heads: int,
    *,
    strength: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Self-attention that also looks at the reference: softmax(q [K, K_ref]ᵀ / √d) [V, V_ref].

    A weight multiplies what a reference token has in the softmax, exp(q·k/√d), before that is normalised: 1 is plain
    appending, 0 is as if the token were not there, and between them the reference fades evenly.

    Args:
        q, k, v: the picture's own, (batch, tokens, heads * dim).
        shared_k, shared_v: the reference's, (batch or 1, shared, heads * dim).
        strength: one weight for all; 0 returns plain attention bit for bit.
        weights: further ones from sharing_weights, broadcastable to (batch, tokens, shared).
    """
    if strength == 0:
        return attention(q, k, v, heads)
    shared_k, shared_v = (for_batch(x, len(q)).to(k.dtype) for x in (shared_k, shared_v))
    joined_k, joined_v = torch.cat([k, shared_k], dim=1), torch.cat([v, shared_v], dim=1)
    if weights is None and strength == 1:
        return attention(q, joined_k, joined_v, heads)
    weights = sharing_weights() if weights is None else weights
    fade = (strength * weights.to(q.device, torch.float32)).log().unsqueeze(1)  # log 0 = -inf: never seen
    fade = fade.expand(*fade.shape[:3], shared_k.shape[1])  # (batch or 1, 1, tokens or 1, shared)
    return attention(q, joined_k, joined_v, heads, F.pad(fade, (k.shape[1], 0)))


def sharing_weights(*, rows: Tensor | None = None, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """How much each query sees of each reference token: the product of what is given.

    Args:
        rows: strength of sharing in each row, (batch,); a row with 0 gets what plain attention gives.
        queries: where in the picture the reference may be seen, (batch or 1, tokens), between 0 and 1.
        keys: what of the reference may be seen, (batch or 1, shared), between 0 and 1.

    Returns:
        (batch or 1, tokens or 1, shared or 1), float32.
    """
    axes = [(rows, (slice(None), None, None)), (queries, (..., None)), (keys, (slice(None), None))]
    weights = torch.ones(1, 1, 1)
    for given, axis in axes:
        if given is not None:
            weights = weights.to(given.device) * given.float()[axis]
    if not ((weights >= 0) & (weights < torch.inf)).all():
        raise ConfigError("strengths and masks of shared attention must be finite numbers and not negative")
    return weights


def kept_tokens(uniform: Tensor, drop_chance: float) -> Tensor:
    """The reference tokens that a training step keeps, as a mask for sharing_weights' ``keys``.

    A masked token counts as little as one that was cut out of keys and values. With a chance of 1 none is kept.

    Args:
        uniform: one draw from [0, 1) per token, shared by all rows, by keys and by values, (shared,).

    Returns:
        (1, shared), bool.
    """
    return (uniform > drop_chance).unsqueeze(0) if drop_chance < 1 else torch.zeros_like(uniform.bool()).unsqueeze(0)


def append_or_repeat(own: Tensor, shared: Sequence[Tensor | None], *, repeat: bool = True) -> Tensor:
    """Keys (or values) of rows with and without sharing in one batch.

    A row without sharing gets its own tokens a second time: a softmax over every key twice is the same average, so
    attention needs no mask. Both keys and values have to be treated so.

    Args:
        own: (chunks * batch, tokens, heads * dim).
        shared: for each chunk of the batch what it shares, (batch or 1, shared, heads * dim), or None.
        repeat: False leaves rows without sharing zeros, which a bias has to hide.

    Returns:
        (chunks * batch, tokens + shared, heads * dim); ``own`` itself where no chunk shares.
    """
    lengths = {reference.shape[1] for reference in shared if reference is not None}
    if not lengths:
        return own
    if len(lengths) > 1 or len(own) % len(shared):
        raise ConfigError(
            f"{len(own)} rows cannot share {len(shared)} references with {sorted(lengths)} tokens; give all of one size"
        )
    (length,) = lengths
    tokens, batch = own.shape[1], len(own) // len(shared)
    if repeat and length % tokens and None in shared:
        raise ConfigError(
            f"rows with and without the reference need as many tokens of both, found {tokens} and {length}; give the "
            "reference the picture's size, or run the rows apart"
        )
    joined = own.new_empty(len(own), tokens + length, own.shape[2])
    joined[:, :tokens] = own
    for rows, mine, reference in zip(joined[:, tokens:].split(batch), own.split(batch), shared):
        if reference is not None:
            rows.copy_(for_batch(reference, batch))
        elif repeat:
            rows.unflatten(1, (-1, tokens)).copy_(mine.unsqueeze(1).expand(-1, length // tokens, -1, -1))
        else:
            rows.zero_()
    return joined


def add_adapter(
    attended: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    scale: float | Tensor,
    region: Tensor | None = None,
) -> Tensor:
    """Decoupled cross-attention (IP-Adapter, arXiv 2308.06721, eq. 5), before the output projection.

    attended + scale · softmax(q K_idᵀ / √d) V_id

    Args:
        attended: cross-attention to the prompt, (batch, queries, heads * dim).
        q: the queries that it used, same shape.
        k, v: keys and values of the identity tokens, (batch or 1, identity tokens, heads * dim).
        scale: one for all, or one per row, (batch,); the number 0 returns ``attended`` itself.
        region: where in the picture the identity may act, (batch or 1, queries), between 0 and 1.
    """
    if not isinstance(scale, Tensor) and scale == 0:
        return attended
    scales = torch.as_tensor(scale, dtype=q.dtype, device=q.device).reshape(-1, 1, 1)
    if region is not None:
        scales = scales * region.to(scales).unsqueeze(2)
    identity = attention(q, for_batch(k, len(q)), for_batch(v, len(q)), heads)
    return attended + scales * identity


def region_tokens(mask: Tensor, height: int, width: int) -> Tensor:
    """A picture's mask as one value per token of an attention layer, by the average over its area.

    Args:
        mask: (batch, picture height, picture width), between 0 and 1.
        height, width: of the layer's feature map.

    Returns:
        (batch, height * width), float32.
    """
    return F.adaptive_avg_pool2d(mask.float().unsqueeze(1), (height, width)).flatten(1)


def for_batch(reference: Tensor, batch: int) -> Tensor:
    """A reference's tensor for each row: as it is, or one for all."""
    if len(reference) not in (1, batch):
        raise ConfigError(f"there are {len(reference)} references for {batch} rows; give one, or one for each row")
    return reference.expand(batch, *reference.shape[1:])
