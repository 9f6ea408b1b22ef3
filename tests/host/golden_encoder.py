"""The recorded tiny SDXL UNet and its face encoder as a model of the host, through the host's own classes."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

from comfyui_personalize.models.lookahead.encoder import read_encoder


def load(case, folder):
    """The host's MODEL of a recorded case, and the encoder read from a file in the authors' layout below ``folder``."""
    weights = case.sibling("weights_unet").weights
    model = _model(case.config, _part(weights, "unet."))
    return model, _encoder(case, weights, folder)


def _model(config, tensors):
    channels, depths = config["block_out_channels"], config["transformer_layers_per_block"]

    class Config(comfy.supported_models.SDXL):
        unet_extra_config = {"num_heads": -1, "num_head_channels": config["head_dim"]}
        custom_operations = comfy.ops.disable_weight_init

    unet_config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [2] * len(channels),
        "transformer_depth": [depth for depth in depths for _ in range(2)],
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "transformer_depth_middle": depths[-1],
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": config["add_embedding_in"],
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }
    model = comfy.model_base.SDXL(Config(unet_config), comfy.model_base.ModelType.EPS)
    model.embedder = Timestep(config["addition_time_embed_dim"])
    names = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    model.diffusion_model.load_state_dict({names[key]: value for key, value in tensors.items()}, strict=True)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _encoder(case, weights, folder):
    """As `torch.save` of the authors' training writes it, with the ranks of the case."""
    own = _part(weights, "encoder.") | _part(case.weights, "encoder.")
    if not case.config["encoder_lora_rank"]:
        own = {key: value for key, value in own.items() if ".lora_layer." not in key or ".extract_kv1." in key}
    if not case.config["kvcopy_lora_rank"]:
        own = {key: value for key, value in own.items() if ".lora_layer." not in key or ".extract_kv1." not in key}
    state = {f"encoder_unet.{key}": value for key, value in (_part(weights, "unet.") | own).items()}
    state |= {f"image_proj_model.{key}": value for key, value in _part(weights, "image_proj_model.").items()}
    path = folder / "model_ckpt.pt"
    torch.save(state, path)
    return read_encoder(path)


def _part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
