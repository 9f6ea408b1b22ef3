"""The tiny SDXL UNet that several cases share, with its LoRA."""

import pytest
from diffusers import UNet2DConditionModel

from comfyui_personalize.models.lora import LowRankDelta, parse_lora
from comfyui_personalize.models.schedules import NoiseSchedule


@pytest.fixture
def schedule(case) -> NoiseSchedule:
    """The case's noise schedule; a prediction type beside the scheduler's settings overrides theirs."""
    settings = case.config["scheduler"]
    assert settings["beta_schedule"] == "scaled_linear", "every Stable Diffusion base has this one"
    return NoiseSchedule.scaled_linear(
        case.config.get("prediction_type", settings["prediction_type"]),
        timesteps=settings["num_train_timesteps"],
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        zero_terminal_snr=settings.get("rescale_betas_zero_snr", False),
    )


def part(weights: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


@pytest.fixture
def shared(case):
    """The case that holds the weights."""
    return case.sibling(case.config.get("weights_case", "tiny_sdxl_unet_weights"))


@pytest.fixture
def tiny_unet(shared) -> UNet2DConditionModel:
    """The frozen UNet, without a LoRA."""
    unet = UNet2DConditionModel(**shared.config["unet_config"])
    unet.load_state_dict(part(shared.weights, "unet."))
    return unet.requires_grad_(False)


@pytest.fixture
def tiny_lora(shared) -> dict[str, LowRankDelta]:
    """Its LoRA, by the UNet's own module names."""
    layers = shared.config["unet_config"]["layers_per_block"]
    return part(parse_lora(part(shared.weights, "lora."), layers_per_block=layers), "unet.")
