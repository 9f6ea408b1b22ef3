"""The loss on the subject alone."""

import torch.nn.functional as F
from torch import Tensor

from ..errors import DatasetError


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of prediction and target, both multiplied by the mask; scalar, float32.

    The mean goes over all pixels, those outside the mask included, as in the authors' code (perfusion/perfusion.py):
    a small subject weighs less than a large one.

    Args:
        prediction, target: noise or velocity, (batch, channels, height, width).
        mask: from resize_mask, (batch, 1, height, width); None counts every pixel.
    """
    prediction, target = prediction.float(), target.float()
    if mask is not None:
        prediction, target = prediction * mask, target * mask
    return F.mse_loss(prediction, target)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (batch, 1, height, width) at the latents' (height, width), bilinearly; float32."""
    return F.interpolate(mask.float(), size, mode="bilinear", align_corners=False)


def soft_mask(mask: Tensor, name: str) -> Tensor:
    """A mask scaled so that its largest value is 1, as the authors do on reading; float32.

    Args:
        mask: any shape, not negative.
        name: of the picture, for the message.

    Raises:
        DatasetError: there is nothing in it, or something that is no brightness.
    """
    mask = mask.float()
    if not mask.isfinite().all() or (mask < 0).any():
        raise DatasetError(f"{name}: the mask holds values that are negative or no numbers; draw it again")
    if not mask.numel() or not mask.max() > 0:
        raise DatasetError(
            f"{name}: the mask is all black, so that nothing would be learned from this picture; make the subject "
            "white, or leave the mask out"
        )
    return mask / mask.max()
