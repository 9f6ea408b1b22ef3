"""What all guidance formulas share."""

from torch import Tensor


def text_guidance(uncond: Tensor | None, text: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): ε̂ = ε_∅ + w (ε_text - ε_∅).

    Args:
        uncond: prediction without text; may be None when ``scale`` is 1, where it cancels.
        text: prediction for the prompt, same shape.
        scale: w.
    """
    return text if uncond is None else uncond + scale * (text - uncond)


def rescale_guidance(guided: Tensor, text: Tensor, strength: float) -> Tensor:
    """Bring a guided prediction back to the standard deviation of the text prediction it is steered by.

    Section 3.4 of arXiv 2305.08891; must be applied to noise or velocity predictions, because the
    standard deviation of a denoised latent is another quantity.

    Args:
        guided, text: (batch, channels, height, width).
        strength: 0 returns ``guided`` unchanged, 1 rescales fully.
    """
    if not strength:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = text.float().std(dim=axes, keepdim=True) / guided.float().std(dim=axes, keepdim=True)
    return (guided * (strength * ratio + 1 - strength)).to(guided.dtype)
