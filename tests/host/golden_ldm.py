"""The recorded tiny LDM UNet of the Perfusion cases as a model of the host, through the host's own classes."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch


def load(case):
    """The host's MODEL of a recorded case, in float32 on the CPU."""
    shared = case.sibling(case.config["weights_case"])
    settings = shared.config["unet_config"]
    assert settings["use_spatial_transformer"] and not settings["legacy"]
    levels, blocks, depth = len(settings["channel_mult"]), settings["num_res_blocks"], settings["transformer_depth"]
    assert settings["attention_resolutions"] == [2**level for level in range(levels)]
    unet_config = {
        "image_size": settings["image_size"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "model_channels": settings["model_channels"],
        "channel_mult": settings["channel_mult"],
        "num_res_blocks": [blocks] * levels,
        "transformer_depth": [depth] * blocks * levels,
        "transformer_depth_output": [depth] * (blocks + 1) * levels,
        "transformer_depth_middle": depth,
        "context_dim": settings["context_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }

    class Config(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": settings["num_heads"], "num_head_channels": -1}
        latent_format = comfy.latent_formats.LatentFormat
        custom_operations = comfy.ops.disable_weight_init

    model = comfy.model_base.BaseModel(Config(unet_config), comfy.model_base.ModelType.EPS)
    model.diffusion_model.load_state_dict(shared.weights, strict=True)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
