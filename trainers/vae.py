"""The autoencoder as training uses it: pictures to scaled latents and back, at full precision where it matters."""

import torch
from torch import Tensor, nn

from ..models.families import Family
from .modules import Component

PIXELS_PER_LATENT = 8
LATENT_CHANNELS = 4


class Autoencoder:
    """Pictures (batch, 3, height, width) in -1..1 to latents as the UNet sees them, and back."""

    def __init__(self, module: nn.Module, latent_scale: float, *, raw_scale: float | None, raw_shift: float = 0.0):
        """Wrap an AutoencoderKL (``raw_scale`` None) or an AutoencoderTiny.

        Args:
            latent_scale: factor from the autoencoder's latents to the UNet's.
            raw_scale, raw_shift: a TAESD's own output y stands for the latent y / raw_scale + raw_shift.
        """
        self.module = module
        self.latent_scale = latent_scale
        self.raw_scale = raw_scale
        self.raw_shift = raw_shift

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def to(self, device: torch.device | str) -> "Autoencoder":
        self.module.to(device)
        return self

    def parked(self, dtype: torch.dtype) -> "Autoencoder":
        """Moved to the CPU until pictures are to be decoded; in bfloat16 where a GPU's models run in it."""
        half = dtype is torch.bfloat16 and self.device.type != "cpu"
        self.module.to("cpu", torch.bfloat16 if half else torch.float32)
        return self

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each (batch, 4, height / 8, width / 8), float32.

        The deviation of a TAESD, which has no posterior, is zero.
        """
        images = images.to(self.device, self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            if self.raw_scale is not None:
                mean = (self.module.encoder(images).float() / self.raw_scale + self.raw_shift) * self.latent_scale
                return mean, torch.zeros_like(mean)
            posterior = self.module.encode(images).latent_dist
        return posterior.mean.float() * self.latent_scale, posterior.std.float() * self.latent_scale

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Pictures in -1..1, float32, from scaled latents; unless clamped they may reach a little beyond.

        Where a clamp takes hold, no gradient passes.
        """
        latents = latents.to(self.device, torch.float32) / self.latent_scale
        with torch.autocast(self.device.type, enabled=False):
            if self.raw_scale is not None:
                images = self.module.decoder(((latents - self.raw_shift) * self.raw_scale).to(self.dtype))
            else:
                images = self.module.decode(latents.to(self.dtype)).sample
        return images.float().clamp(-1, 1) if clamp else images.float()


def load_autoencoder(
    component: Component, family: Family, dtype: torch.dtype, device: torch.device | str
) -> Autoencoder:
    """Load the autoencoder in float32, or bfloat16 where asked and not on the CPU.

    float16 is never used: SDXL's autoencoder overflows in it.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if dtype is torch.bfloat16 and device.type != "cpu" else torch.float32
    module = component.load(dtype, device)
    if component.kind == "vae":
        return Autoencoder(module, family.latent_scale, raw_scale=None)
    if not any("taesd_" in name for name in component.names):
        # A TAESD in files of its own knows scaled latents; one inside a checkpoint says which it knows.
        return Autoencoder(module, family.latent_scale, raw_scale=family.latent_scale)
    prefix = component.names[0].split("taesd_")[0]
    numbers = component.weights.read([f"{prefix}vae_scale", f"{prefix}vae_shift"], torch.float32)
    scale, shift = numbers.get(f"{prefix}vae_scale"), numbers.get(f"{prefix}vae_shift")
    return Autoencoder(
        module,
        family.latent_scale,
        raw_scale=1.0 if scale is None else scale.item(),
        raw_shift=0.0 if shift is None else shift.item(),
    )
