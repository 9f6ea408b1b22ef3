"""Module names of whole SD1.5, SD2.1 and SDXL UNets, in every layout and back."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from transformers import CLIPTextConfig, CLIPTextModel

from comfyui_personalize.models.keys import dotted, sgm_to_diffusers, to_sgm

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LAYERS = (torch.nn.Linear, torch.nn.Conv2d)


def layers_of(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def unet_layers(request):
    with torch.device("meta"):
        return layers_of(UNet2DConditionModel(**{"sd15": SD15, "sdxl": SDXL}[request.param]))


def in_attention(names: list[str]) -> list[str]:
    return [name for name in names if ".attentions." in name]


def test_underscored_names_of_every_layer_are_read_back(unet_layers):
    assert len(unet_layers) > 250
    for name in unet_layers:
        assert dotted(name.replace(".", "_")) == name


def test_underscored_names_of_text_encoders_are_read_back():
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    names = layers_of(model)
    assert len(names) == 12 * 6
    for name in names:
        name = "text_model." + name.removeprefix("text_model.")
        assert dotted(name.replace(".", "_")) == name


def test_original_names_of_attention_layers_are_read_back(unet_layers):
    names = in_attention(unet_layers)
    originals = [to_sgm(name) for name in names]
    assert len(set(originals)) == len(names) > 100
    for name, original in zip(names, originals, strict=True):
        assert original.startswith(("input_blocks.", "middle_block.1.", "output_blocks."))
        assert sgm_to_diffusers(original) == name
        assert dotted(original.replace(".", "_")) == original


@pytest.mark.parametrize(
    ("name", "original"),
    [  # block numbers as in the published SD1.5 and SDXL checkpoints
        ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        ("up_blocks.0.attentions.2.norm", "output_blocks.2.1.norm"),
        ("up_blocks.3.attentions.0.proj_in", "output_blocks.9.1.proj_in"),
        ("down_blocks.1.attentions.0.transformer_blocks.1.norm1", "input_blocks.4.1.transformer_blocks.1.norm1"),
    ],
)
def test_known_names(name, original):
    assert to_sgm(name) == original
    assert sgm_to_diffusers(original) == name


def test_other_names_stay():
    for name in ("conv_in", "time_embedding.linear_1", "mid_block.resnets.0.conv1", "input_blocks.1.0.in_layers.2"):
        assert to_sgm(name) == name
        assert sgm_to_diffusers(name) == name


@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
def test_the_mapping_is_that_of_diffusers(layers_per_block):
    settings = SDXL | {"layers_per_block": layers_per_block}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)
    names = in_attention(layers_of(unet))
    # diffusers translates the numbers here and the names of the sides elsewhere.
    kohya = {to_sgm(name, layers_per_block).replace(".", "_"): name for name in names}
    mapped = _maybe_map_sgm_blocks_to_diffusers({f"lora_unet_{key}.lora_down.weight": 0 for key in kohya}, unet.config)
    sides = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    theirs = {re.sub("|".join(sides), lambda match: sides[match[0]], key) for key in mapped}
    assert theirs == {f"lora_unet_{name.replace('.', '_')}.lora_down.weight" for name in names}
    for key, name in kohya.items():
        assert sgm_to_diffusers(dotted(key), layers_per_block) == name
