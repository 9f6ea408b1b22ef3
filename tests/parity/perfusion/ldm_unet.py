"""The recorded tiny UNet, whose weights carry LDM's names, as a diffusers UNet."""

from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from comfyui_personalize.models.families import SD15
from comfyui_personalize.models.keys import sgm_to_diffusers
from comfyui_personalize.trainers.architecture import unet_config


def build(weights, settings) -> UNet2DConditionModel:
    """Args: settings: the arguments of LDM's own class."""
    assert settings["use_spatial_transformer"] and not settings["legacy"] and settings["num_heads"] > 0
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = unet_config(shapes, SD15, "recorded UNet") | {"attention_head_dim": settings["num_heads"]}
    assert config["layers_per_block"] == settings["num_res_blocks"]
    unet = UNet2DConditionModel(**config)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(prefixed, config=config), strict=True)
    return unet.requires_grad_(False).eval()


def outputs(tensors, layers) -> dict:
    """``<LDM name>.target_output`` -> diffusers' name of the projection."""
    return {
        sgm_to_diffusers(name.removesuffix(".target_output"), layers): rows
        for name, rows in tensors.items()
        if name.endswith(".target_output")
    }
