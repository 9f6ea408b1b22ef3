"""Random face encoders for the tiny models, in memory and as the files that the loader reads.

An encoder is strong enough that a picture shows it and tame enough that sampling ends where it would without it. The
resampler reads the image encoder of clip_vision.json.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_personalize.models.lookahead import Resampler
from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder, write_encoder
from comfyui_personalize.models.lora import LowRankDelta

HERE = Path(__file__).resolve().parent
CLIP_VISION_SIZES = json.loads((HERE / "clip_vision.json").read_text())
TOKENS, DIM = 4, 64
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
VALUE_GAIN, LORA_GAIN = 1.0, 0.2
"""Of the adapter's values, and of every low-rank change, relative to the weights that they stand beside."""


def make_encoder(checkpoint_name: str, seed: int = 0, rank: int = 4) -> LookaheadEncoder:
    """An encoder for a tiny model: "sdxl" or "world_sdxl", or any other name in checkpoints.FAMILIES.

    As in the authors' files every block has an adapter and copies of keys and values, and every attention projection
    a LoRA, except in the UNet's last block, behind which nothing is read. Rank 0 gives an encoder without any LoRA.
    """
    context = _family(checkpoint_name).context_width
    generator = torch.Generator().manual_seed(seed)

    def normal(outputs: int, inputs: int, gain: float = 1.0) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) * (gain / math.sqrt(inputs))

    def delta(outputs: int, inputs: int) -> LowRankDelta:
        return LowRankDelta(normal(rank, inputs), normal(outputs, rank, LORA_GAIN))

    widths = dict(blocks(checkpoint_name))
    last = list(widths)[-1]
    adapter, lora, copies = {}, {}, {}
    for block, width in widths.items():
        adapter[block] = normal(width, context), normal(width, context, VALUE_GAIN)
        copies[block] = (delta(width, width), delta(width, width)) if rank else (None, None)
        if rank and block != last:
            for attention, inputs in (("attn1", width), ("attn2", context)):
                for projection in PROJECTIONS:
                    seen = inputs if projection in ("to_k", "to_v") else width
                    lora[f"{block}.{attention}.{projection}"] = delta(width, seen)
    return LookaheadEncoder(_resampler(context, seed), adapter, lora, copies, f"{checkpoint_name}_encoder", {})


def blocks(checkpoint_name: str) -> Iterator[tuple[str, int]]:
    """Transformer blocks of a tiny UNet in diffusers' names, in the order of its forward pass, with their widths."""
    sizes = _family(checkpoint_name)
    levels = list(zip(sizes.multipliers, sizes.depths, strict=True))

    def level(name: str, multiplier: int, depth: int, attentions: int) -> Iterator[tuple[str, int]]:
        for attention in range(attentions):
            for index in range(depth):
                yield f"{name}.attentions.{attention}.transformer_blocks.{index}", sizes.channels * multiplier

    for index, (multiplier, depth) in enumerate(levels):
        yield from level(f"down_blocks.{index}", multiplier, depth, sizes.residual_blocks)
    yield from level("mid_block", sizes.multipliers[-1], sizes.middle_depth, 1)
    for index, (multiplier, depth) in enumerate(reversed(levels)):
        yield from level(f"up_blocks.{index}", multiplier, depth, sizes.residual_blocks + 1)


def write_slim(path: Path, checkpoint_name: str, seed: int = 0, rank: int = 4) -> Path:
    """make_encoder's encoder as our own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_encoder(path, make_encoder(checkpoint_name, seed, rank), {}, overwrite=True)


def write_authors_checkpoint(path: Path, checkpoint_name: str, checkpoint: Path, seed: int = 0, rank: int = 4) -> Path:
    """The same as a model_ckpt.pt: the whole encoder UNet and the image encoder lie in it too.

    Args:
        checkpoint: the tiny checkpoint itself, whose UNet the encoder was trained from.
    """
    from comfyui_personalize.trainers.base import open_base

    encoder = make_encoder(checkpoint_name, seed, rank)
    unet = {key: value.float() for key, value in open_base(checkpoint).load_unet().state_dict().items()}
    tensors = dict(unet)
    for module, change in encoder.lora.items():
        tensors |= _authors_lora(module, change)
    for block, copies in encoder.copies.items():
        for extract, attention in (("extract_kv1", "attn1"), ("extract_kv2", "attn2")):
            again = f"{block}.{extract}.source_attention_block"
            own = {key: value for key, value in tensors.items() if key.startswith(f"{block}.{attention}.")}
            tensors |= {key.replace(f"{block}.{attention}", again): value for key, value in own.items()}
        for projection, copy, adapter in zip(("to_k", "to_v"), copies, encoder.adapter[block], strict=True):
            tensors[f"{block}.extract_kv1.{projection}.weight"] = unet[f"{block}.attn1.{projection}.weight"].clone()
            tensors[f"{block}.extract_kv2.{projection}.weight"] = adapter
            if copy is not None:
                tensors |= _authors_lora(f"{block}.extract_kv1.{projection}", copy)
    tensors = {f"encoder_unet.{name}": value for name, value in tensors.items()}
    tensors |= {f"image_encoder.{name}": value.half() for name, value in clip_vision_tensors(seed).items()}
    tensors |= {f"image_proj_model.{name}": value for name, value in encoder.resampler.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def write_clip_vision(path: Path, seed: int = 0) -> Path:
    """A random image encoder for the host's clip_vision folder; the test-only node folder knows its sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in clip_vision_tensors(seed).items()}, path)
    return path


def clip_vision_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Its weights under transformers' names."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    # As wide as initializer_range makes them by default, weights would hide one picture's difference from another.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_VISION_SIZES, initializer_range=0.1))
    return {name: value.detach() for name, value in model.state_dict().items() if not name.endswith("position_ids")}


def _family(checkpoint_name: str):
    name = "personalize_tiny_lookahead_sizes"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / "checkpoints.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].FAMILIES[checkpoint_name]


def _resampler(output_dim: int, seed: int) -> Resampler:
    sizes = {"dim": DIM, "tokens": TOKENS, "depth": 2, "inner_dim": 2 * DIM, "hidden_dim": 2 * DIM}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Resampler(picture_dim=CLIP_VISION_SIZES["hidden_size"], output_dim=output_dim, **sizes)
        # What every picture shares would otherwise outweigh what it shows.
        with torch.no_grad():
            made.latents *= 0.3
            for attention, _ in made.layers:
                attention.to_q.weight *= 3
                attention.to_kv.weight *= 2
                attention.to_out.weight *= 3
    return made.requires_grad_(False).eval()


def _authors_lora(module: str, change: LowRankDelta) -> dict[str, Tensor]:
    name = f"{module}.lora_layer"
    return {f"{name}.down.weight": change.down, f"{name}.up.weight": change.up * change.scale}
