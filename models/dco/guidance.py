"""Reward guidance: sampling with separate scales for the text and for what was learned."""

from collections.abc import Sequence

from torch import Tensor

from ..guidance import text_guidance


def reward_guidance(
    uncond: Tensor | None,
    base: Tensor,
    personalized: Sequence[Tensor],
    *,
    text_scale: float,
    reward_scales: Sequence[float],
) -> Tensor:
    """Guide by the text and, separately, by what each personalization changed.

    ε̂ = ε_∅ + w_text (ε_base - ε_∅) + Σ_k w_k (ε_k - ε_base)    (arXiv 2402.12004, section 4.3)

    The reward term is measured from the base model's *text* prediction, not from ε_∅. The weights
    sum to one, so the same formula holds for noise, velocity and denoised predictions.

    Args:
        uncond: prediction without text; may be None when ``text_scale`` is 1, where it cancels.
        base: the base model's prediction for the prompt without learned tokens.
        personalized: one prediction per personalization.
        text_scale: classifier-free guidance scale.
        reward_scales: one scale per entry of ``personalized``; 0 ignores it.

    Each prediction is (batch, channels, height, width).
    """
    guided = text_guidance(uncond, base, text_scale)
    for prediction, scale in zip(personalized, reward_scales, strict=True):
        guided = guided + scale * (prediction - base)
    return guided
