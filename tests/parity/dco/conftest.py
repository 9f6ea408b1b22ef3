"""The tiny SDXL UNet that several cases share, with its LoRA."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig


@pytest.fixture
def tiny_unet(case) -> UNet2DConditionModel:
    """The frozen UNet of the case, without a LoRA."""
    weights = case.sibling(case.config.get("weights_case", "tiny_sdxl_unet_weights"))
    unet = UNet2DConditionModel(**weights.config["unet_config"])
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.weights.items() if k.startswith("unet.")})
    return unet.requires_grad_(False).eval()


@pytest.fixture
def tiny_lora(case) -> dict[str, torch.Tensor]:
    """The LoRA tensors of the case under peft's parameter names."""
    weights = case.sibling(case.config.get("weights_case", "tiny_sdxl_unet_weights"))
    return {
        k.removeprefix("lora.")
        .replace(".lora.down.weight", ".lora_A.default.weight")
        .replace(".lora.up.weight", ".lora_B.default.weight"): v
        for k, v in weights.weights.items()
        if k.startswith("lora.")
    }


@pytest.fixture
def tiny_unet_with_lora(case, tiny_unet, tiny_lora) -> UNet2DConditionModel:
    """The UNet of the case with its LoRA attached and trainable."""
    config = case.sibling(case.config.get("weights_case", "tiny_sdxl_unet_weights")).config
    tiny_unet.add_adapter(
        LoraConfig(r=config["rank"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"])
    )
    state = tiny_unet.state_dict()
    assert {name for name in state if ".lora_" in name} == tiny_lora.keys()
    tiny_unet.load_state_dict(state | tiny_lora)
    return tiny_unet
