"""Networks in folders as transformers saves them: which kind it is, its weights, and how it wants its pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..models.errors import FormatError
from .pictures import covering_size

Kind = Literal["clip", "dino", "clipseg"]

_KINDS: dict[str, Kind] = {
    "clip": "clip",
    "clipseg": "clipseg",
    "vit": "dino",
    "dinov2": "dino",
    "dinov2_with_registers": "dino",
    "dinov3_vit": "dino",
}
"""transformers' model_type -> what it can be used for. All of DINO's kind have the class token first."""
_FIXED_SIZE = ("clip", "vit")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_LARGEST_CONFIG = 1_000_000
"""Bytes."""
Colours = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""
CLIP_COLOURS: Colours = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_COLOURS: Colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its pictures, as its preprocessor_config.json says."""

    resize: int | tuple[int, int]
    """Length of the shorter side; or height and width, whatever the picture's shape."""
    crop: tuple[int, int]
    """Height and width that are cut out of the middle."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture of mode RGB -> (3, height, width), normalized."""
        height, width = self.crop
        if isinstance(self.resize, int):
            full = covering_size((image.height, image.width), (self.resize, self.resize))
        else:
            full = self.resize
        top, left = (full[0] - height) // 2, (full[1] - width) // 2
        part = (left / full[1], top / full[0], (left + width) / full[1], (top + height) / full[0])
        # In one resampling of what is kept, so that a picture of 1 x 5000 pixels needs no more memory than a square.
        box = [min(share * side, side) for share, side in zip(part, (image.width, image.height) * 2)]
        small = image.resize((width, height), self.resample, box=box)
        pixels = torch.from_numpy(np.array(small, dtype=np.float32)).movedim(-1, 0) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def network_in(folder: Path) -> Kind | None:
    """What the network in a folder can be used for, told by its config.json; None for anything else."""
    if not any((folder / name).is_file() for name in _WEIGHTS):
        return None
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    return _KINDS.get(kind) if isinstance(kind, str) else None


def folder_files(folder: Path) -> list[Path]:
    """The files of a folder that decide what its network says."""
    return sorted(path for ending in ("*.json", "*.safetensors", "*.bin") for path in folder.glob(ending))


def require_network(folder: Path, kind: Kind, wanted: str) -> None:
    if network_in(folder) != kind:
        raise FormatError(
            f"{folder.name}: holds no {wanted}; put its config.json, model.safetensors and preprocessor_config.json "
            "there"
        )


def load_network(kind: Any, folder: Path) -> nn.Module:
    try:
        network, report = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, weights_only=True, output_loading_info=True
        )
    # transformers, safetensors and torch raise each their own, down to a bare Exception.
    except Exception as error:
        said = (str(error).strip() or repr(error)).splitlines()[0].replace(str(folder), folder.name)
        raise FormatError(f"{folder.name}: could not be read ({said}); download its files again") from error
    # Files for classification carry no pooler, and we do not ask it.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise FormatError(
            f"{folder.name}: lacks weights ({len(missing)}, such as {missing[0]}); download its files again"
        )
    return network.float().train(False).requires_grad_(False)


def read_preprocessing(folder: Path, side: int, colours: Colours) -> Preprocessing:
    """What preprocessor_config.json says; without one, the middle square at the network's own size."""
    config = _read_json(folder / "preprocessor_config.json")
    try:
        cropped = config.get("do_center_crop", "crop_size" in config or not config)
        resize = _size(config.get("size", side), cropped)
        crop = _size(config.get("crop_size", side), False) if cropped else resize
        crop = (crop, crop) if isinstance(crop, int) else crop
        mean, std = (
            tuple(float(value) for value in config.get(name, default))
            for name, default in zip(("image_mean", "image_std"), colours)
        )
        wanted = Preprocessing(resize, crop, mean, std, Image.Resampling(config.get("resample", 3)))
        shortest = resize if isinstance(resize, int) else min(resize)
        if not (len(mean) == len(std) == 3 and all(std) and 0 < max(wanted.crop) <= shortest <= 4096):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{folder.name}: its preprocessor_config.json does not say how large and in which colours the network "
            "wants its pictures; download that file again, or remove it"
        ) from error
    if _read_json(folder / "config.json").get("model_type") in _FIXED_SIZE and crop != (side, side):
        raise FormatError(
            f"{folder.name}: its preprocessor_config.json makes pictures of {crop[1]} x {crop[0]} pixels, but the "
            f"network takes {side} x {side}; download both files again"
        )
    return wanted


def _size(size: int | dict[str, int], shortest: bool) -> int | tuple[int, int]:
    """A size as transformers writes it; a bare number is the shorter side or a square."""
    if isinstance(size, dict):
        return int(size["shortest_edge"]) if "shortest_edge" in size else (int(size["height"]), int(size["width"]))
    return int(size) if shortest else (int(size), int(size))


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty when there is none that can be read."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
