"""Guidance with separate scales for the text, for the shared attention with text, and for it alone."""

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from ..errors import ConfigError

Row = Literal["plain_uncond", "plain_text", "shared_uncond", "shared_text"]
"""A prediction by whether the reference's keys and values are joined to self-attention, and by its prompt.

The adapter's tokens are in cross-attention in all four.
"""


def guidance_weights(text_scale: float, full_scale: float, identity_scale: float) -> dict[Row, float]:
    """What each prediction counts when attention is shared; those that count nothing are left out.

    ε̂ = p_∅ + w_text (p_text - p_∅) + w_full (s_text - p_∅) + w_identity (s_∅ - p_∅), where p is plain, s shares
    attention and ∅ is the empty prompt (OrLichter/lcm-lookahead, where the scales are called nokv, full and kv).
    The weights sum to one, so the same formula holds for noise, velocity and denoised predictions.
    """
    uncond = 1 - text_scale - full_scale - identity_scale
    weights = {
        "plain_uncond": uncond,
        "plain_text": text_scale,
        "shared_uncond": identity_scale,
        "shared_text": full_scale,
    }
    return _needed(weights)


def plain_weights(scale: float) -> dict[Row, float]:
    """What each prediction counts without shared attention: ε̂ = p_∅ + w (p_text - p_∅)."""
    return _needed({"plain_uncond": 1 - scale, "plain_text": scale})


def few_step_weights(*, sharing: bool) -> dict[Row, float]:
    """A consistency model's one row: its guidance is distilled into it."""
    return {"shared_text" if sharing else "plain_text": 1.0}


def lookahead_guidance(predictions: Mapping[Row, Tensor], weights: Mapping[Row, float]) -> Tensor:
    """The weighted sum of the predictions.

    Args:
        predictions: at least the rows that ``weights`` names, each (batch, channels, height, width).
        weights: from one of the three functions above.
    """
    if missing := sorted(weights.keys() - predictions.keys()):
        raise ConfigError(f"guidance needs the predictions {missing}, only {sorted(predictions)} were computed")
    if len(weights) == 1:
        ((row, _),) = weights.items()
        return predictions[row]
    return sum(weight * predictions[row] for row, weight in weights.items())


def _needed(weights: dict[Row, float]) -> dict[Row, float]:
    if not all(map(math.isfinite, weights.values())):
        raise ConfigError(f"guidance scales must be finite numbers, they give the weights {weights}")
    return {row: weight for row, weight in weights.items() if abs(weight) > 1e-9}  # 1 - 0.1 - 0.2 - 0.7 is not quite 0
