"""Small networks that judge pictures, with random weights, in folders as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SIDE = 32
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


def write_clip(folder: Path, *, tokenizer=None) -> Path:
    """CLIPModel, and the tokenizer if there is one."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=24)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return _write(CLIPModel, config, folder)


def write_dino(folder: Path, kind: str = "vit") -> Path:
    """ViTModel, as facebook/dino-vits16 is one, or Dinov2Model."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    model, config = {"vit": (ViTModel, ViTConfig), "dinov2": (Dinov2Model, Dinov2Config)}[kind]
    sizes = _VISION | {"mlp_ratio": 2} if kind == "dinov2" else _VISION
    return _write(model, config(**sizes), folder)


def write_clipseg(folder: Path, *, tokenizer=None) -> Path:
    """CLIPSegForImageSegmentation, for squares of SIDE, and the tokenizer if there is one."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    decoder = {"extract_layers": [0, 1], "reduce_dim": 16, "decoder_intermediate_size": 32}
    config = CLIPSegConfig(
        text_config=_TEXT, vision_config=_VISION, projection_dim=24, decoder_num_attention_heads=2, **decoder
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write(CLIPSegForImageSegmentation, config, folder)
    write_preprocessor(folder, size={"height": SIDE, "width": SIDE}, resample=2)
    return folder


def write_preprocessor(folder: Path, **values) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def _write(kind, config, folder: Path) -> Path:
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind(config)
        for weight in network.parameters():  # the usual start is so small that all pictures look the same
            if weight.ndim > 1:
                torch.nn.init.normal_(weight.data, std=weight[0].numel() ** -0.5)
        network.save_pretrained(folder)
    return folder
