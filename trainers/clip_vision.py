"""CLIP-Vision from a file or folder on disk: pictures to the hidden states that identity tokens are made of."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..models.errors import FormatError, IncompatibleModelError
from .modules import check_fit, restore_buffers
from .weights import Weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
"""By width, which the weights of a file without settings tell; ViT-B, L, H and bigG."""
_QUICK = {768, 1024}
"""Widths of OpenAI's own models, whose activation differs."""


def clip_pictures(pictures: Tensor, size: int) -> Tensor:
    """Pictures (batch, 3, height, width) in -1..1 as CLIP-Vision wants them, (batch, 3, size, size).

    Eight bits, the shorter side scaled with Pillow's bicubic filter, the middle cut out: what transformers'
    CLIPImageProcessor does with the picture that the authors hand it.
    """
    return torch.stack([_clip_picture(picture, size) for picture in pictures])


def _clip_picture(picture: Tensor, size: int) -> Tensor:
    levels = ((picture.detach().float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round()
    image = Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())
    factor = size / min(image.size)
    width, height = (max(size, int(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return ((torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


class ClipVision:
    """The frozen image encoder."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name

    @property
    def width(self) -> int:
        return self.module.config.hidden_size

    @torch.no_grad()
    def hidden_states(self, pictures: Tensor) -> Tensor:
        """Of the last layer but one, (batch, patches + 1, width), float32 on the CPU; pictures as clip_pictures."""
        weight = next(self.module.parameters())
        pixels = clip_pictures(pictures, self.module.config.image_size).to(weight)
        return self.module(pixels, output_hidden_states=True).hidden_states[-2].float().cpu()

    @torch.no_grad()
    def nobody(self) -> Tensor:
        """Hidden states of the picture that is zero after normalisation, (1, patches + 1, width)."""
        weight, side = next(self.module.parameters()), self.module.config.image_size
        pixels = torch.zeros(1, 3, side, side).to(weight)
        return self.module(pixels, output_hidden_states=True).hidden_states[-2].float().cpu()


def load_clip_vision(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> ClipVision:
    """Load transformers' weights from a single file, or from a folder with a config.json.

    Beside a single file of an unusual size, its settings may lie under the same name with the ending .json.

    Raises:
        FormatError: absent, damaged, or no CLIP-Vision model.
        IncompatibleModelError: a size that is not known and that no config.json tells.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path = Path(path)
    settings = None
    if path.is_dir():
        settings = _settings(path / "config.json")
        files = [path / "model.safetensors", path / "pytorch_model.bin"]
        path = next((file for file in files if file.is_file()), files[0])
    if not path.is_file():
        raise FormatError(
            f"{path}: no such CLIP-Vision file; give the ViT-H model that the IP-Adapter was trained with"
        )
    weights = Weights.open(path)
    names = [name for name in weights.shapes if name.startswith("vision_model.") and "position_ids" not in name]
    names += [name for name in weights.shapes if name == "visual_projection.weight"]
    try:
        config = CLIPVisionConfig(**(settings or _sizes(weights.shapes, path)))
    except KeyError as error:
        raise FormatError(
            f"{path.name}: no CLIP-Vision model, {error.args[0]} is missing; give a file with transformers' names"
        ) from error
    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(config)
    tensors = weights.read(names, dtype)
    check_fit(module, tensors, path.name, "image encoder")
    module.load_state_dict(tensors, strict=True, assign=True)
    restore_buffers(module)
    return ClipVision(module.to(device).train(False).requires_grad_(False), path.name)


def _settings(path: Path) -> dict[str, int | str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path.parent.name}: no {path.name} that can be read; give the folder image_encoder"
        ) from error


def _sizes(shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, int | str]:
    embeddings = "vision_model.embeddings."
    width, _, _, patch = shapes[f"{embeddings}patch_embedding.weight"]
    positions, _ = shapes[f"{embeddings}position_embedding.weight"]
    if width not in _HEADS:
        told = path.with_suffix(".json")
        if told.is_file():
            return _settings(told)
        raise IncompatibleModelError(
            f"{path.name}: a CLIP-Vision model {width} wide, known are {sorted(_HEADS)}; put its config.json beside it "
            f"as {told.name}"
        )
    layers = [int(key.split(".")[3]) for key in shapes if key.startswith("vision_model.encoder.layers.")]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": _HEADS[width],
        "image_size": patch * round((positions - 1) ** 0.5),
        "patch_size": patch,
        "projection_dim": shapes["visual_projection.weight"][0],
        "hidden_act": "quick_gelu" if width in _QUICK else "gelu",
    }
