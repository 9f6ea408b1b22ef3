"""The recorded tiny UNets as models of the host, through its own classes and its own table of weight names."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep


class _Multiple(float):
    """A channel multiplier below one, whose products stay whole numbers; the host's own are integers."""

    def __mul__(self, other):
        return round(float(self) * other)

    __rmul__ = __mul__


def _operations(groups):
    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups, num_channels, *args, **settings):
            super().__init__(groups, num_channels, *args, **settings)  # the host asks for 32 everywhere

    return type("Operations", (comfy.ops.disable_weight_init,), {"GroupNorm": GroupNorm})


class _Model(comfy.model_base.BaseModel):
    """SDXL's micro-conditioning with sizes given in the conditioning and an embedding of any width."""

    def encode_adm(self, pooled_output=None, time_ids=None, **_others):
        embedded = Timestep(self.time_id_width)(time_ids.flatten()).view(time_ids.shape[0], -1)
        return torch.cat([pooled_output, embedded.to(pooled_output)], dim=1)


def _unet_config(config):
    channels, depths = config["block_out_channels"], config["transformer_layers_per_block"]
    blocks, levels = config["layers_per_block"], len(channels)
    depths = [
        depth if "CrossAttn" in kind else 0 for depth, kind in zip(depths, config["down_block_types"], strict=True)
    ]
    heads = {width // count for width, count, depth in zip(channels, config["attention_head_dim"], depths) if depth}
    (head_width,) = heads  # the host knows one width per head
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [_Multiple(width / channels[0]) for width in channels],
        "num_res_blocks": [blocks] * levels,
        "transformer_depth": [depth for depth in depths for _ in range(blocks)],
        "transformer_depth_output": [depth for depth in depths for _ in range(blocks + 1)],
        "transformer_depth_middle": depths[-1],
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "legacy": False,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }, {"num_heads": -1, "num_head_channels": head_width}


def load(case):
    """The host's MODEL for a recorded case whose settings name the UNet and the schedule.

    Returns:
        The MODEL, in float32 on the CPU, and its LoRA's tensors under their recorded names.
    """
    unet_config, heads = _unet_config(case.config["unet_config"])
    schedule, weights = case.config["scheduler"], case.sibling(case.config["weights_case"]).weights

    class Config(comfy.supported_models.SDXL):
        unet_extra_config = heads
        latent_format = comfy.latent_formats.LatentFormat
        custom_operations = _operations(case.config["unet_config"]["norm_num_groups"])
        sampling_settings = {
            "linear_start": schedule["beta_start"],
            "linear_end": schedule["beta_end"],
            "timesteps": schedule["num_train_timesteps"],
        }

    assert schedule["beta_schedule"] == "scaled_linear"
    kind = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}[schedule["prediction_type"]]
    model = _Model(Config(unet_config), getattr(comfy.model_base.ModelType, kind))
    model.time_id_width = case.config["unet_config"]["addition_time_embed_dim"]
    names = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    recorded = {key.removeprefix("unet."): value for key, value in weights.items() if key.startswith("unet.")}
    model.diffusion_model.load_state_dict({names[key]: value for key, value in recorded.items()}, strict=True)
    lora = {key.removeprefix("lora."): value for key, value in weights.items() if key.startswith("lora.")}
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")), lora
