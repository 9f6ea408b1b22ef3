"""Encoder files in small: the authors' checkpoint, and the adapter files that trainings start from."""

import gzip
import json
from pathlib import Path

import pytest
import torch

RECORDED = Path(__file__).resolve().parents[3] / "parity/data/lookahead/model_ckpt_keys.json.gz"
BLOCKS = (
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.0.attentions.2.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
)
WITHOUT_LORA = BLOCKS[2]
WIDTH, CONTEXT, TOKEN_WIDTH = 6, 5, 5
RESAMPLER = {
    "latents": (1, 3, 64), "proj_in.weight": (64, 8), "proj_in.bias": (64,), "proj_out.weight": (TOKEN_WIDTH, 64),
    "proj_out.bias": (TOKEN_WIDTH,), "norm_out.weight": (TOKEN_WIDTH,), "norm_out.bias": (TOKEN_WIDTH,),
    "layers.0.0.norm1.weight": (64,), "layers.0.0.norm1.bias": (64,), "layers.0.0.norm2.weight": (64,),
    "layers.0.0.norm2.bias": (64,), "layers.0.0.to_q.weight": (64, 64), "layers.0.0.to_kv.weight": (128, 64),
    "layers.0.0.to_out.weight": (64, 64), "layers.0.1.0.weight": (64,), "layers.0.1.0.bias": (64,),
    "layers.0.1.1.weight": (96, 64), "layers.0.1.3.weight": (64, 96),
}  # fmt: skip


@pytest.fixture(scope="session")
def recorded_keys():
    """What was recorded of the authors' full-size files: keys with shapes and kinds, totals, the adapter's order."""
    return json.loads(gzip.decompress(RECORDED.read_bytes()))


@pytest.fixture
def draw():
    """draw(*shape) -> random float32 numbers, always the same."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def authors(draw):
    """authors(rank, copy_rank) -> a model_ckpt.pt's tensors: four blocks, one of which has no LoRA."""

    def tensors(rank=2, copy_rank=3):
        made = {"conv_in.weight": draw(4, 4, 3, 3), "conv_in.bias": draw(4)}
        for block in BLOCKS:
            made[f"{block}.norm1.weight"] = draw(WIDTH)
            for number, inputs in ((1, WIDTH), (2, CONTEXT)):
                for which in ("to_q", "to_k", "to_v", "to_out.0"):
                    seen = inputs if which in ("to_k", "to_v") else WIDTH
                    made[f"{block}.attn{number}.{which}.weight"] = draw(WIDTH, seen)
                    if rank and block != WITHOUT_LORA:
                        made |= lora(f"{block}.attn{number}.{which}", rank, WIDTH, seen)
                for which in ("to_k", "to_v"):
                    own = made[f"{block}.attn{number}.{which}.weight"]
                    made[f"{block}.extract_kv{number}.source_attention_block.{which}.weight"] = own
            for which in ("to_k", "to_v"):
                made[f"{block}.extract_kv1.{which}.weight"] = made[f"{block}.attn1.{which}.weight"].clone()
                made[f"{block}.extract_kv2.{which}.weight"] = draw(WIDTH, CONTEXT)
                if copy_rank:
                    made |= lora(f"{block}.extract_kv1.{which}", copy_rank, WIDTH, WIDTH)
        made = {f"encoder_unet.{name}": tensor for name, tensor in made.items()}
        made |= {f"image_proj_model.{name}": draw(*shape) for name, shape in RESAMPLER.items()}
        return made | {"image_encoder.vision_model.post_layernorm.bias": draw(7).half()}

    def lora(module, rank, outputs, inputs):
        stem = f"{module}.lora_layer"
        return {f"{stem}.down.weight": draw(rank, inputs), f"{stem}.up.weight": draw(outputs, rank)}

    return tensors


@pytest.fixture
def ip_adapter(draw):
    """ip_adapter(blocks) -> the two dictionaries of an ip-adapter-plus .bin file."""

    def contents(blocks=4):
        layers = {
            f"{2 * i + 1}.{which}_ip.weight": draw(WIDTH, CONTEXT) for i in range(blocks) for which in ("to_k", "to_v")
        }
        return {"image_proj": {name: draw(*shape) for name, shape in RESAMPLER.items()}, "ip_adapter": layers}

    return contents


@pytest.fixture
def saved(tmp_path):
    """saved(contents) -> path of a .pt file with them."""

    def save(contents, name="model_ckpt.pt", **options):
        torch.save(contents, tmp_path / name, **options)
        return tmp_path / name

    return save
