"""The tiny weights that several cases share."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from comfyui_personalize.models.lookahead import Resampler
from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder, read_encoder
from comfyui_personalize.trainers.conditioning import Conditioning


@pytest.fixture
def shared(case):
    """The case that holds the weights."""
    return case.sibling(case.config["weights"].removesuffix(".safetensors"))


@pytest.fixture
def resampler(shared) -> Resampler:
    """The resampler of those weights, without gradients."""
    made = Resampler.from_tensors(shared.weights, prefix="image_proj_model.", head_dim=shared.config["head_dim"])
    return made.requires_grad_(False)


def part(weights: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


@pytest.fixture
def tiny_unet(shared) -> UNet2DConditionModel:
    """The frozen UNet of those weights."""
    weights, config = part(shared.weights, "unet."), shared.config
    channels, depths = config["block_out_channels"], config["transformer_layers_per_block"]
    unet = UNet2DConditionModel(
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=len(weights["conv_out.weight"]),
        block_out_channels=channels,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        transformer_layers_per_block=depths,
        attention_head_dim=[max(1, width // config["head_dim"]) for width in channels],  # the number of heads
        cross_attention_dim=config["cross_attention_dim"],
        use_linear_projection=True,
        norm_num_groups=config["norm_num_groups"],
        time_embedding_dim=config["time_embed_dim"],
        addition_embed_type="text_time",
        addition_time_embed_dim=config["addition_time_embed_dim"],
        projection_class_embeddings_input_dim=config["add_embedding_in"],
    )
    unet.load_state_dict(weights)
    return unet.requires_grad_(False)


@pytest.fixture
def encoder(case, shared, tmp_path) -> LookaheadEncoder:
    """The encoder of those weights, read from a file like the authors'; a case may have weights in place of some."""
    own = part(shared.weights, "encoder.")
    if not case.config["encoder_lora_rank"]:
        own = {key: value for key, value in own.items() if ".lora_layer." not in key or ".extract_kv1." in key}
    if not case.config["kvcopy_lora_rank"]:
        own = {key: value for key, value in own.items() if ".extract_kv1." not in key or ".lora_layer." not in key}
    own = part(shared.weights, "unet.") | own | part(case.weights, "encoder.")
    file = {f"encoder_unet.{key}": value for key, value in own.items()}
    file |= {key: value for key, value in shared.weights.items() if key.startswith("image_proj_model.")}
    torch.save(file, tmp_path / "model_ckpt.pt")
    return read_encoder(tmp_path / "model_ckpt.pt")


@pytest.fixture
def recorded_pass(case):
    """Inputs of a pass by their prefix: ``enc_``, ``dec_`` or none; its latents, timesteps and conditioning."""

    def collect(prefix: str = "") -> SimpleNamespace:
        names = ("sample", "timesteps", "text", "pooled", "time_ids")
        sample, timesteps, *told = (case.inputs[prefix + name] for name in names)
        return SimpleNamespace(sample=sample, timesteps=timesteps, conditioning=Conditioning(*told))

    return collect


@pytest.fixture
def freeu(tiny_unet):
    """FreeU as the authors apply it: b1 and s1 never act, because they take the first level's index for none."""

    @contextmanager
    def during(settings: dict):
        level = tiny_unet.up_blocks[1]
        try:
            for name, value in settings.items():
                setattr(level, name, value)
            yield
        finally:
            for name in settings:
                delattr(level, name)

    return during
