"""The losses on the previewed picture, by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.errors import FormatError, MissingDependencyError
from ...models.formats import read_weights
from ...models.lookahead.arcface import build_arcface
from ...models.lookahead.losses import identity_loss
from ...models.lookahead.preview_losses import clip_pixels
from ..clip_vision import MEAN, STD
from .config import LookaheadConfig, LookaheadModels

_VGG_SLICES = {"slice1": range(0, 4), "slice2": range(4, 9), "slice3": range(9, 16), "slice4": range(16, 23)}
_VGG_SLICES["slice5"] = range(23, 30)
"""Where the package lpips keeps torchvision's layers."""
_DREAMSIM_SIDE = 224


@dataclass(frozen=True)
class Seen:
    """What a loss may look at."""

    pictures: Tensor
    """Previews, (batch, 3, height, width) in about -1..1, with gradient."""
    references: Tensor
    """What the encoder saw, the same shape, in -1..1."""
    landmarks: Sequence[Tensor | None]
    """Of the references' faces."""
    prompts: Sequence[str]
    faceless: float | None = None
    """Loss ``identity`` of a preview in which no face is found; None leaves such rows out."""


Loss = Callable[[Seen], Tensor]
Finder = Callable[[Tensor], Tensor | None]
"""A picture (3, height, width) -> landmarks of its face, (5, 2), or None."""


def make_losses(
    config: LookaheadConfig, models: LookaheadModels, finder: Finder, device: torch.device
) -> dict[str, tuple[float, Loss]]:
    """Name -> weight and loss, of those that the settings name.

    Raises:
        FormatError: a file is damaged or something else.
        MissingDependencyError: an optional package is not installed.
    """
    makers: dict[str, Callable[[], Loss]] = {
        "identity": lambda: _identity(config, models, finder, device),
        "image_l1": lambda: lambda seen: F.l1_loss(seen.pictures, seen.references),
        "clip": lambda: _clip(models, device),
        "lpips": lambda: _lpips(models, device),
        "dreamsim": lambda: _dreamsim(models, device),
    }
    return {term.name: (term.weight, makers[term.name]()) for term in config.picture_losses}


def _identity(config: LookaheadConfig, models: LookaheadModels, finder: Finder, device: torch.device) -> Loss:
    network = build_arcface(read_weights(models.face_network)[0], models.face_network.name).to(device)

    def loss(seen: Seen) -> Tensor:
        landmarks = [finder(picture) for picture in seen.pictures]
        found = identity_loss(
            network, seen.pictures, landmarks, seen.references, seen.landmarks, size=network.size, how=config.face_fit
        )
        if seen.faceless is None:
            return found
        wanted = [
            points is None for points, theirs in zip(landmarks, seen.landmarks, strict=True) if theirs is not None
        ]
        missing = sum(wanted) / max(len(wanted), 1)
        return (1 - missing) * found + missing * seen.faceless

    return loss


def _clip(models: LookaheadModels, device: torch.device) -> Loss:
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(models.clip, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(models.clip, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{models.clip.name}: no CLIP model with a tokenizer; give a folder such as ViT-B/16"
        ) from error
    model = model.to(device).train(False).requires_grad_(False)
    size = model.config.vision_config.image_size

    def loss(seen: Seen) -> Tensor:
        told = tokenizer(list(seen.prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        result = model(**told, pixel_values=clip_pixels(seen.pictures, size, MEAN, STD))
        return 1 - (result.image_embeds * result.text_embeds).sum(-1).mean()

    return loss


def _lpips(models: LookaheadModels, device: torch.device) -> Loss:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise MissingDependencyError(
            "the loss lpips needs the package lpips, which is not installed; install it, or leave the loss out"
        ) from error
    # Asked for its own weights, the package would download them.
    network = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = read_weights(models.vgg)[0]
    try:
        layers = {
            f"{part}.{index}.{kind}": weights[f"features.{index}.{kind}"]
            for part, indices in _VGG_SLICES.items()
            for index in indices
            for kind in ("weight", "bias")
            if f"features.{index}.{kind}" in weights
        }
        network.net.load_state_dict(layers)
    except RuntimeError as error:
        raise FormatError(f"{models.vgg.name}: not torchvision's vgg16; give vgg16-397923af.pth") from error
    network = network.to(device).train(False).requires_grad_(False)
    return lambda seen: network(seen.pictures, seen.references).mean()


def _dreamsim(models: LookaheadModels, device: torch.device) -> Loss:
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise MissingDependencyError(
            "the loss dreamsim needs the package dreamsim, which is not installed; install it, or leave the loss out"
        ) from error
    with _without_downloads(models.dreamsim.name):
        network, _ = dreamsim(pretrained=True, device=str(device), cache_dir=str(models.dreamsim))
    network = network.train(False).requires_grad_(False)

    def small(pictures: Tensor) -> Tensor:
        side = (_DREAMSIM_SIDE, _DREAMSIM_SIDE)
        return F.interpolate((pictures + 1) / 2, side, mode="bicubic", antialias=True, align_corners=False)

    return lambda seen: network(small(seen.pictures), small(seen.references)).mean()


@contextmanager
def _without_downloads(name: str) -> Iterator[None]:
    """Refuse what a package would download: which files it wants differs between its versions."""

    def refuse(*_, **__):
        raise FormatError(f"{name}: files are missing; give the folder of the unpacked ensemble checkpoint")

    downloads = ("download_url_to_file", "load_state_dict_from_url", "load")
    before = {function: getattr(torch.hub, function) for function in downloads}
    try:
        for function in downloads:
            setattr(torch.hub, function, refuse)
        yield
    finally:
        for function, own in before.items():
            setattr(torch.hub, function, own)
