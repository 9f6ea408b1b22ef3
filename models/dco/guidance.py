"""Reward guidance: sampling with separate scales for the text and for what was learned."""

from collections.abc import Sequence

from torch import Tensor


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
    guided = base if uncond is None else uncond + text_scale * (base - uncond)
    for prediction, scale in zip(personalized, reward_scales, strict=True):
        guided = guided + scale * (prediction - base)
    return guided


def rescale_guidance(guided: Tensor, base: Tensor, strength: float) -> Tensor:
    """Bring a guided prediction back to the standard deviation of the base model's text prediction.

    Section 3.4 of arXiv 2305.08891; must be applied to noise or velocity predictions, because the
    standard deviation of a denoised latent is another quantity.

    Args:
        guided, base: (batch, channels, height, width).
        strength: 0 returns ``guided`` unchanged, 1 rescales fully.
    """
    if not strength:
        return guided
    axes = tuple(range(1, guided.ndim))
    rescaled = guided * (base.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return strength * rescaled + (1 - strength) * guided
