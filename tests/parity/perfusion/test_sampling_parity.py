"""The authors' samplers, with their analytic stand-in for the UNet."""

import pytest
import torch

from comfyui_personalize.models.guidance import text_guidance
from comfyui_personalize.models.perfusion import (
    ddim,
    ddim_timesteps,
    edm_sigmas,
    euler_edm,
    nearest_timestep,
    training_sigmas,
)
from comfyui_personalize.models.schedules import NoiseSchedule


@pytest.fixture
def predict(case):
    """The recorded formula eps = tanh(a x + c̄ P + b sin(t / 10)), with guidance by its two prompts."""
    config, P = case.config, case.weights["P"]

    def eps(x, timesteps, conditioning):
        bias = conditioning.mean(dim=1) @ P + config["b"] * torch.sin(timesteps.float() / 10).unsqueeze(1)
        return torch.tanh(config["a"] * x + bias[..., None, None])

    def guided(x, timesteps):
        uncond, cond = (eps(x, timesteps, case.inputs[name]) for name in ("uncond", "cond"))
        return text_guidance(uncond, cond, config["scale"])

    return guided


@pytest.mark.golden("perfusion", "ddim_sampling*")
def test_ddim(case, predict):
    config = case.config
    assert config["eta"] == 0
    kept = NoiseSchedule.scaled_linear(beta_start=config["linear_start"], beta_end=config["linear_end"]).alphas_cumprod
    timesteps = ddim_timesteps(config["S"])
    case.check("timesteps", timesteps)
    ends = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    # The authors' tables are in ascending order.
    case.check("ddim_alphas", kept[timesteps.flip(0)])
    case.check("ddim_alphas_prev", kept[ends.flip(0)])
    for step, (latents, clean) in enumerate(ddim(predict, case.inputs["x_T"], kept, timesteps)):
        case.check(f"x_{step}", latents)
        case.check(f"pred_x0_{step}", clean)
    case.check("final", latents)


@pytest.mark.golden("perfusion", "euler_edm_sampling")
def test_euler_in_edm_discretization(case, predict):
    config = case.config
    table = training_sigmas(NoiseSchedule.scaled_linear().alphas_cumprod)
    case.check("sigma_table", table)
    sigmas = edm_sigmas(
        config["num_steps"], sigma_min=config["sigma_min"], sigma_max=config["sigma_max"], rho=config["rho"]
    )
    case.check("sigmas", sigmas)
    timesteps = torch.tensor([nearest_timestep(sigma, table) for sigma in sigmas[:-1].tolist()])
    case.check("timesteps", timesteps)
    case.check("quantized_sigmas", table[timesteps])
    for step, latents in enumerate(euler_edm(predict, case.inputs["randn"], sigmas, table)):
        case.check(f"x_{step}", latents)
    case.check("final", latents)
