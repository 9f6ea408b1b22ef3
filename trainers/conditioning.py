"""What a diffusers UNet is told besides the noisy latents, and the call that tells it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What tells the UNet what to draw."""

    embeds: Tensor
    """(batch, tokens, dim)."""
    pooled: Tensor | None = None
    """(batch, dim) for SDXL."""
    time_ids: Tensor | None = None
    """(batch, 6) for SDXL: original height and width, crop top and left, target height and width."""

    def first(self, count: int) -> "Conditioning":
        """The conditioning of the first ``count`` rows."""
        parts = (self.embeds, self.pooled, self.time_ids)
        return Conditioning(*(None if part is None else part[:count] for part in parts))

    @classmethod
    def join(cls, *parts: "Conditioning") -> "Conditioning":
        """Several conditionings as one batch."""
        columns = zip(*((part.embeds, part.pooled, part.time_ids) for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


def predict(unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet's prediction, (batch, channels, height, width); timesteps are training indices, (batch,) or scalar."""
    added = None
    if conditioning.pooled is not None:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
    return unet(noisy, timesteps, conditioning.embeds, added_cond_kwargs=added, return_dict=False)[0]
