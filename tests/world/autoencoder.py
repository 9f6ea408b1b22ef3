"""The small world's autoencoder: a TAESD whose fine levels use part of their channels.

A TAESD (github.com/madebyollin/taesd) has 64 channels and three blocks at nearly every resolution, which is far
more than drawings of 64 x 64 pixels need and more than a CPU can train. `NarrowAutoencoder` has the same layers
with fewer channels and blocks where there are many pixels; `taesd_tensors` fills the rest with zeros, which
changes nothing but the shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 4
WIDTH = 64
WIDTHS = (16, 32, 64, 64)
"""Channels in use at 1, 1/2, 1/4 and 1/8 of the resolution."""
BLOCKS = (1, 1, 2, 3)
"""Residual blocks in use there."""
FULL_BLOCKS = (1, 3, 3, 3)


class Block(nn.Module):
    """TAESD's residual block."""

    def __init__(self, width: int):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.conv = nn.Sequential(_conv(width, width), relu, _conv(width, width), relu, _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x, inplace=True)


class NarrowAutoencoder(nn.Module):
    """Pictures (batch, 3, height, width) in 0..1 to latents (batch, 4, height / 8, width / 8) and back."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, blocks: tuple[int, ...] = BLOCKS):
        super().__init__()
        stages = [
            [
                *(Block(width) for _ in range(used)),
                *(nn.ReLU() for _ in range(full - used)),
            ]  # a block of zeros is a ReLU
            for width, used, full in zip(widths * 2, blocks * 2, FULL_BLOCKS * 2)
        ]
        down, up = stages[:4], stages[:3:-1]
        fine, half, quarter, coarse = widths
        self.encoder = nn.Sequential(
            _conv(3, fine),
            *down[0],
            _conv(fine, half, bias=False, stride=2),
            *down[1],
            _conv(half, quarter, bias=False, stride=2),
            *down[2],
            _conv(quarter, coarse, bias=False, stride=2),
            *down[3],
            _conv(coarse, LATENT_CHANNELS),
        )
        self.decoder = nn.Sequential(
            nn.Identity(),  # stands for TAESD's clamp, so that the numbers of the layers agree
            _conv(LATENT_CHANNELS, coarse),
            nn.ReLU(inplace=True),
            *up[0],
            nn.Upsample(scale_factor=2),
            _conv(coarse, quarter, bias=False),
            *up[1],
            nn.Upsample(scale_factor=2),
            _conv(quarter, half, bias=False),
            *up[2],
            nn.Upsample(scale_factor=2),
            _conv(half, fine, bias=False),
            *up[3],
            _conv(fine, 3),
        )
        self._initialize()

    def _initialize(self) -> None:
        """Kaiming, with residual branches that start small: the default start never finds the colours."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Block):
                    module.conv[-1].weight *= 0.1
            self.encoder[-1].weight *= 0.7
            self.decoder[-1].weight *= 0.3
            self.decoder[-1].bias.fill_(0.5)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents are squeezed first as TAESD does, 3 tanh(z / 3)."""
        return self.decoder(torch.tanh(latents / 3) * 3)


def _conv(inputs: int, outputs: int, *, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, stride=stride)


def taesd_tensors(model: NarrowAutoencoder, latent_scale: float) -> dict[str, Tensor]:
    """The weights as a TAESD of full width inside a checkpoint, under the host's names.

    Args:
        latent_scale: the family's; the file tells loaders to hand out latents divided by it.
    """
    tensors = {}
    for half in ("encoder", "decoder"):
        layers = getattr(model, half)
        given = layers.state_dict()
        wide = {
            f"{index}.{name}": weight
            for index, layer in enumerate(layers)
            if _is_unused(index, layers)
            for name, weight in Block(WIDTH).state_dict().items()
        }
        for name, weight in (wide | given).items():
            if name in wide:
                full = torch.zeros_like(weight)
            else:
                full = weight.new_zeros([_full(size) for size in weight.shape[:2]] + list(weight.shape[2:]))
                full[tuple(slice(size) for size in weight.shape)] = weight
            tensors[f"taesd_{half}.{name}"] = full
    tensors["vae_scale"] = torch.tensor(latent_scale)
    tensors["vae_shift"] = torch.tensor(0.0)
    return tensors


def _full(channels: int) -> int:
    return channels if channels in (3, LATENT_CHANNELS) else WIDTH


def _is_unused(index: int, layers: nn.Sequential) -> bool:
    """Whether a ReLU stands for a block, and not for the activation after the decoder's first layer."""
    return isinstance(layers[index], nn.ReLU) and index > 2


def reconstruction_loss(pictures: Tensor, decoded: Tensor, weight: Tensor) -> Tensor:
    """Squared error, weighted (batch, 1, height, width), with a little absolute error and error of slopes."""
    error = decoded - pictures
    squared = (error.square() * weight).mean()
    slopes = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return squared + 0.02 * error.abs().mean() + 0.02 * slopes


def latent_penalty(latents: Tensor) -> Tensor:
    """Keeps each channel at mean 0 and variance 1, so that the diffusion model needs no factor of its own."""
    variance = latents.var(dim=(0, 2, 3))
    return (latents.mean(dim=(0, 2, 3)).square() + variance.clamp(min=1e-4).log().square()).mean()


def psnr(decoded: Tensor, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pictures, in 0..1, together."""
    return -10 * (decoded.clamp(0, 1) - pictures).square().mean().log10().item()
