"""The plain denoising objective, which methods train with, build on or preserve a class by."""

import torch.nn.functional as F
from torch import Tensor


def denoising_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error over the whole batch, in float32.

    Args:
        prediction, target: (batch, channels, height, width).
        weights: optional factor per sample, (batch,), such as min-SNR weights.
    """
    if weights is None:
        return F.mse_loss(prediction.float(), target.float())
    per_sample = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    return (per_sample * weights.to(per_sample)).mean()
