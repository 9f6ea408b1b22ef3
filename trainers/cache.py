"""Latents of every training picture, encoded once, so that the VAE can leave before training begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.errors import TrainingError
from .dataset import Example
from .pictures import Crop, Cut
from .progress import Cancelled, Progress, SilentProgress

SizeConditioning = Literal["square", "true"]
ShrinkMask = Callable[[Tensor, tuple[int, int], str], Tensor]
"""Mask (1, height, width) of a cut in pixels, the latents' (height, width), the picture's name -> mask of that size."""


def average_cells(mask: Tensor, size: tuple[int, int], _name: str) -> Tensor:
    """A mask averaged over the pixels of each latent cell, which keeps its total weight."""
    return F.interpolate(mask.unsqueeze(0), size=size, mode="area")[0]


class MomentsEncoder(Protocol):
    """The one thing asked of a VAE."""

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the scaled latents, each (batch, channels, height, width).

        Args:
            images: (batch, 3, 8 height, 8 width) in -1..1, float32 on the CPU; moving them is the encoder's part.

        Returns:
            The standard deviation may be None for a VAE without one.
        """
        ...


@dataclass(frozen=True)
class LatentSample:
    """Latents drawn for one training step, unbatched, on the CPU in float32."""

    latents: Tensor
    """(channels, height, width), scaled as the UNet expects them."""
    mask: Tensor | None
    """(1, height, width) in 0..1; None when no picture of the cache has a mask."""
    time_ids: tuple[int, int, int, int, int, int]
    """SDXL's original height and width, crop top and left, target height and width."""
    prefix: str = ""
    """What an augmentation has the caption begin with."""


class Augmentation(Protocol):
    """Makes further variants of a cut, which training draws like other cuts; the cut itself comes first."""

    variants: int

    def __call__(self, cut: Cut, generator: torch.Generator) -> tuple[Cut, str]:
        """A changed cut, and what its caption begins with."""
        ...


@dataclass(frozen=True)
class _Variant:
    mean: Tensor
    std: Tensor
    mask: Tensor | None
    time_ids: tuple[int, int, int, int, int, int]
    prefix: str = ""


class LatentCache:
    """Posterior moments of every example, in one or several cuts each, in float32 on the CPU.

    When some examples have a mask, those without count as a whole.
    """

    def __init__(self, variants: Sequence[Sequence[_Variant]]) -> None:
        self._variants = [list(cuts) for cuts in variants]
        self.has_masks = any(variant.mask is not None for cuts in self._variants for variant in cuts)

    @classmethod
    def build(
        cls,
        examples: Sequence[Example],
        vae: MomentsEncoder,
        *,
        size: int | tuple[int, int],
        crop: Crop = "center",
        variants: int = 1,
        flip: bool = False,
        seed: int = 0,
        size_conditioning: SizeConditioning = "square",
        shrink_mask: ShrinkMask = average_cells,
        augmentation: Augmentation | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Encode every example, one cut at a time, so that memory does not depend on how many there are.

        Args:
            size: side of the square, or (height, width), in pixels.
            crop: "center" makes one cut of each picture, "random" makes ``variants`` different ones.
            flip: add the mirror image of every cut.
            seed: of the random cuts, which are the same for the same seed, on every process.
            size_conditioning: "square" tells SDXL that every picture has the training size and is uncut,
                as the authors of DCO do; "true" tells it the picture's own size and the cut's position.
            shrink_mask: how masks come to the size of latents.
            augmentation: adds variants of every different cut.
            progress: told after each picture, and asked before each cut whether to stop.

        Raises:
            Cancelled: ``progress`` wanted to stop.
            DatasetError: a picture has changed or vanished since the dataset was made.
            TrainingError: the VAE returned NaN or infinite values.
        """
        if crop == "center":
            variants = 1
        progress = progress or SilentProgress()
        generator, further = (torch.Generator().manual_seed(seed) for _ in range(2))
        cached = []
        for done, example in enumerate(examples, start=1):
            opened = example.open()
            cuts = []
            encoded: dict[tuple[tuple[int, int], bool], list[_Variant]] = {}
            for _ in range(variants):
                # The mirror image shows the same part of the picture: its cut is drawn from the same state.
                state = generator.get_state()
                for mirrored in (False, True) if flip else (False,):
                    if progress.cancelled():
                        raise Cancelled(f"cancelled while encoding {example.picture.name}")
                    generator.set_state(state)
                    cut = opened.cut(size, crop=crop, flip=mirrored, generator=generator)
                    place = cut.crop_top_left, mirrored
                    if place not in encoded:  # a square picture has but one cut, however often it is drawn
                        encoded[place] = [_encode(cut, vae, example.picture.name, size_conditioning, shrink_mask)]
                        for _ in range(augmentation.variants if augmentation else 0):
                            if progress.cancelled():
                                raise Cancelled(f"cancelled while encoding {example.picture.name}")
                            changed, prefix = augmentation(cut, further)
                            variant = _encode(changed, vae, example.picture.name, size_conditioning, shrink_mask)
                            encoded[place].append(replace(variant, prefix=prefix))
                    cuts += encoded[place]
            cached.append(cuts)
            progress.report(done, len(examples), f"encoding pictures: {example.picture.name}")
        return cls(cached)

    def __len__(self) -> int:
        return len(self._variants)

    def variants(self, index: int) -> int:
        """Number of cuts that example ``index`` is drawn from."""
        return len(self._variants[index])

    def moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of an example's latents in its first cut, each (channels, height, width)."""
        first = self._variants[index][0]
        return first.mean, first.std

    def time_ids(self, indices: Sequence[int]) -> Tensor:
        """SDXL's size conditioning of the examples' first cuts, (examples, 6)."""
        return torch.tensor([self._variants[index][0].time_ids for index in indices], dtype=torch.float32)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        """Masks of the examples' first cuts, (examples, 1, height, width); None when no picture has one."""
        firsts = [self._variants[index][0] for index in indices]
        return stack_masks(firsts) if self.has_masks else None

    def sample(self, index: int, generator: torch.Generator) -> LatentSample:
        """Draw a cut of example ``index`` and, from its posterior, latents: mean + std · ε.

        The generator, on the CPU, advances alike for every example of one size, whatever its number of
        cuts and whether or not the VAE has a deviation, so that processes which skip the result stay in step.
        """
        choice = torch.rand((), generator=generator)
        cuts = self._variants[index]
        variant = cuts[min(int(choice * len(cuts)), len(cuts) - 1)]
        noise = torch.randn(variant.mean.shape, generator=generator)
        mask = variant.mask
        if mask is None and self.has_masks:
            mask = torch.ones(1, *variant.mean.shape[-2:])
        return LatentSample(variant.mean + variant.std * noise, mask, variant.time_ids, variant.prefix)


def stack_masks(samples: Sequence["LatentSample | _Variant"]) -> Tensor | None:
    """Masks of a batch as (batch, 1, height, width), ones where there is none; None when none has one.

    Batches that mix two caches, instance and class pictures, may have masks in only one of them.
    """
    if all(sample.mask is None for sample in samples):
        return None
    ones = torch.ones_like(next(sample.mask for sample in samples if sample.mask is not None))
    return torch.stack([ones if sample.mask is None else sample.mask for sample in samples])


@torch.no_grad()
def _encode(
    cut: Cut, vae: MomentsEncoder, name: str, size_conditioning: SizeConditioning, shrink_mask: ShrinkMask
) -> _Variant:
    mean, std = vae.encode_moments(cut.pixels.unsqueeze(0))
    mean = mean[0].detach().to("cpu", torch.float32)
    std = torch.zeros_like(mean) if std is None else std[0].detach().to("cpu", torch.float32)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise TrainingError(
            f"{name}: the VAE returned values that are not numbers; run it in float32, or choose another VAE"
        )
    mask = None
    if cut.mask is not None:
        mask = shrink_mask(cut.mask, tuple(mean.shape[-2:]), name)
    height, width = cut.pixels.shape[-2:]
    if size_conditioning == "true":
        time_ids = (*cut.original_size, *cut.crop_top_left, height, width)
    else:
        time_ids = (height, width, 0, 0, height, width)
    return _Variant(mean, std, mask, time_ids)
