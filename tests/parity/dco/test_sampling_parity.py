"""Reward guidance against the authors' pipeline: the formula, and whole trajectories through the tiny UNet."""

import diffusers
import pytest
import torch

from comfyui_personalize.models.dco import reward_guidance
from comfyui_personalize.models.guidance import rescale_guidance
from comfyui_personalize.trainers.adapters import set_lora
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.sampling import guided, sample


@pytest.mark.golden("dco", "reward_guidance_combine")
def test_combination(case):
    uncond, base, personalized = (case.inputs[name] for name in ("uncond", "text", "lora_text"))
    for name in case.expected:
        settings = case.config[f"settings_{name}"]
        guided = reward_guidance(
            uncond, base, [personalized], text_scale=settings["w"], reward_scales=[settings["w_lora"]]
        )
        case.check(name, rescale_guidance(guided, base, settings["guidance_rescale"]))


@pytest.mark.golden("dco", "reward_sampling_*")
def test_trajectory(case, tiny_unet, tiny_lora):
    config, unit = case.config, case.inputs["latents"]
    settings = dict(config["scheduler"])
    scheduler = getattr(diffusers, settings.pop("cls"))(**settings)
    assert config["eta"] == 0, "no draws were recorded for ancestral noise"
    set_lora(tiny_unet, tiny_lora)

    def conditioning(prompt: str) -> Conditioning:
        rows = len(unit)
        return Conditioning(
            case.inputs[f"{prompt}_embeds"].expand(rows, -1, -1),
            case.inputs[f"{prompt}_pooled"].expand(rows, -1),
            torch.tensor([config["time_ids"]] * rows, dtype=unit.dtype),
        )

    predict = guided(
        tiny_unet,
        conditioning("negative"),
        conditioning("base"),
        conditioning("concept"),
        text_scale=config["w"],
        reward_scale=config["w_lora"],
        rescale=config["guidance_rescale"],
    )
    predictions = []

    def recorded(x, timestep):
        predictions.append(predict(x, timestep))
        return predictions[-1]

    states = list(sample(scheduler, recorded, unit, config["steps"]))
    for step, (state, prediction) in enumerate(zip(states, predictions, strict=True)):
        case.check(f"latents_{step}", state)
        case.check(f"eps_{step}", prediction)
    case.check("final", states[-1])
    case.check("timesteps", scheduler.timesteps)
    assert float(scheduler.init_noise_sigma) == pytest.approx(config["init_noise_sigma"], rel=case.meta["rtol"])
    if "sigmas" in case.expected:
        case.check("sigmas", scheduler.sigmas)
