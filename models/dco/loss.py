"""The Direct Consistency loss."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..denoising import denoising_error


def dco_loss(
    prediction: Tensor,
    reference: Tensor,
    target: Tensor,
    beta: float,
    *,
    weights: Tensor | None = None,
    average_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Reward the model for beating its frozen base on the same noisy latents.

    L = -log σ(-β (‖prediction - target‖² - ‖reference - target‖²)). The paper (eq. 8) takes the
    expectation outside the sigmoid; the authors' trainer (kyungmnlee/dco, customize.py) averages
    both errors over the batch first and applies one sigmoid, and so do we.

    Args:
        prediction: the fine-tuned model's output, (batch, channels, height, width).
        reference: the frozen base model's output, same shape; carries no gradient.
        target: noise or velocity, whichever the model predicts, same shape.
        beta: strength of the pull towards the base model; the authors use 1000.
        weights: optional loss weight per sample, (batch,).
        average_over_ranks: mean of a scalar over all processes. With it the value inside the sigmoid
            is that of the whole distributed batch, so n processes train like one with n times the batch.

    Returns:
        Scalar in float32, whatever the inputs' dtype.
    """
    gain = denoising_error(prediction, target, weights) - denoising_error(reference.detach(), target, weights)
    if average_over_ranks is not None:
        gain = gain + (average_over_ranks(gain.detach()) - gain.detach())
    return -F.logsigmoid(-beta * gain)
