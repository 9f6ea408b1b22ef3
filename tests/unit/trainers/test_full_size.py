"""The published SD1.5, SD2.1 and SDXL checkpoints by names and shapes: recognised, no weight missing or left over."""

import struct

import pytest
import torch

from comfyui_personalize.trainers.base import open_base

UNET_CONFIGS = {  # as in the unet/config.json of each published diffusers folder
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 768,
        "use_linear_projection": False,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "addition_embed_type": None,
        "projection_class_embeddings_input_dim": None,
    },
    "sd21": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": [5, 10, 20, 20],
        "transformer_layers_per_block": 1,
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "addition_embed_type": None,
        "projection_class_embeddings_input_dim": None,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
EVERY_UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "center_input_sample": False}
TEXT_CONFIGS = {
    "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    # Of its 24 layers the last is never used; diffusers publishes 23.
    "clip_h": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    "clip_g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
}
UNET_PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
TEXT_PARAMETERS = {"clip_l": 123_060_480, "clip_h": 340_387_840, "clip_g": 694_659_840}
VAE_PARAMETERS = 83_653_863


@pytest.fixture(params=UNET_CONFIGS)
def published(request, load_helper, monkeypatch, tmp_path):
    full_size = load_helper("tiny/full_size.py")
    shapes = full_size.published_shapes(load_helper("tiny/checkpoints.py"), monkeypatch, request.param)
    path = full_size.write_hollow(tmp_path / f"{request.param}.safetensors", shapes)
    yield request.param, open_base(path)
    path.unlink()


def fitted(component):
    """The module without values, after every tensor of the file was found to fit it."""
    module = component.build()
    component.fit(
        module, {name: torch.empty(component.weights.shapes[name], device="meta") for name in component.names}
    )
    return module


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_unet_is_the_published_one(published):
    family, base = published
    assert base.family.name == family
    unet = fitted(base.unet)
    for key, value in (EVERY_UNET | UNET_CONFIGS[family]).items():
        found = unet.config[key]
        assert (list(found) if isinstance(value, list) else found) == value, key
    assert parameters(unet) == UNET_PARAMETERS[family]


def test_text_encoders_are_the_published_ones(published):
    _, base = published
    for slot, component in zip(base.family.encoders, base.text_encoders):
        encoder = fitted(component)
        for key, value in TEXT_CONFIGS[slot.key].items():
            assert getattr(encoder.config, key) == value, key
        assert encoder.config.hidden_act == ("quick_gelu" if slot.key == "clip_l" else "gelu")
        assert encoder.config.vocab_size == 49408
        assert hasattr(encoder, "text_projection") == (slot.key == "clip_g")
        assert parameters(encoder) == TEXT_PARAMETERS[slot.key]


def test_autoencoder_is_the_published_one(published):
    _, base = published
    vae = fitted(base.vae)
    assert vae.config.block_out_channels == (128, 256, 512, 512)
    assert (vae.config.layers_per_block, vae.config.latent_channels) == (2, 4)
    assert parameters(vae) == VAE_PARAMETERS


def test_velocity_of_sd21_is_told_by_the_spread_of_one_bias(load_helper, monkeypatch, tmp_path):
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    full_size = load_helper("tiny/full_size.py")
    shapes = full_size.published_shapes(load_helper("tiny/checkpoints.py"), monkeypatch, "sd21")
    shapes = {name: shapes.pop(name), **shapes}  # its data come first
    path = full_size.write_hollow(tmp_path / "sd21.safetensors", shapes)
    assert open_base(path).prediction_type == "epsilon"
    spread = torch.linspace(-0.2, 0.2, 320, dtype=torch.float16)
    with path.open("r+b") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        file.write(spread.numpy().tobytes())
    assert open_base(path).prediction_type == "v_prediction"
