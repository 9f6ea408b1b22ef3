"""Custom Diffusion as the authors of DVAR train it: its masked loss, and the token that carries no gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_prior_loss(prediction: Tensor, target: Tensor, mask: Tensor, class_rows: int) -> tuple[Tensor, Tensor]:
    """Loss with its prior preservation, and that part alone (yandex-research/DVAR, textual_inversion.py).

    Per instance row, the squared error under the mask is summed over the channels and the cells, and divided by
    the mask's one channel: with four channels, four times a mean. The class rows have the plain mean.

    Args:
        prediction, target: (batch, channels, height, width); the class rows come last.
        mask: 1 where the picture counts, (batch, 1, height, width); that of the class rows is not used.

    Returns:
        Two scalars in float32.
    """
    first = len(prediction) - class_rows
    error = (prediction[:first].float() - target[:first].float()).square() * mask[:first]
    instance = (error.sum((1, 2, 3)) / mask[:first].sum((1, 2, 3))).mean()
    prior = F.mse_loss(prediction[first:].float(), target[first:].float()) if class_rows else instance.new_zeros(())
    return instance + prior, prior


def first_token_detached(projected: Tensor) -> Tensor:
    """Keys or values of cross-attention whose first token, the start token, passes no gradient on.

    Args: projected: (batch, tokens, dim); the values stay as they are.
    """
    return torch.cat([projected[:, :1].detach(), projected[:, 1:]], dim=1)
