"""Reward guidance against the authors' pipeline: the formula, and whole trajectories through the tiny UNet."""

import diffusers
import pytest
import torch

from comfyui_personalize.models.dco import rescale_guidance, reward_guidance


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
@torch.no_grad()
def test_trajectory(case, tiny_unet_with_lora):
    config, unet = case.config, tiny_unet_with_lora
    settings = dict(config["scheduler"])
    scheduler = getattr(diffusers, settings.pop("cls"))(**settings)
    scheduler.set_timesteps(config["steps"])
    assert config["eta"] == 0, "no draws were recorded for ancestral noise"

    unit = case.inputs["latents"]
    batch = len(unit)
    sizes = torch.tensor([config["time_ids"]] * batch, dtype=unit.dtype)

    def predict(latents, timestep, prompt):
        pooled = case.inputs[f"{prompt}_pooled"].expand(batch, -1)
        embeds = case.inputs[f"{prompt}_embeds"].expand(batch, -1, -1)
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        return unet(latents, timestep, embeds, added_cond_kwargs=conditions).sample

    latents = unit * scheduler.init_noise_sigma
    assert float(scheduler.init_noise_sigma) == pytest.approx(config["init_noise_sigma"], rel=case.meta["rtol"])
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        unet.disable_adapters()
        uncond, base = predict(scaled, timestep, "negative"), predict(scaled, timestep, "base")
        unet.enable_adapters()
        personalized = predict(scaled, timestep, "concept")
        guided = reward_guidance(uncond, base, [personalized], text_scale=config["w"], reward_scales=[config["w_lora"]])
        guided = rescale_guidance(guided, base, config["guidance_rescale"])
        latents = scheduler.step(guided, timestep, latents).prev_sample
        case.check(f"eps_{step}", guided)
        case.check(f"latents_{step}", latents)
    case.check("final", latents)
    case.check("timesteps", scheduler.timesteps)
    if "sigmas" in case.expected:
        case.check("sigmas", scheduler.sigmas)
