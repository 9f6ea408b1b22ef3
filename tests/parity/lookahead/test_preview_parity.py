"""The one-step estimate and the timesteps that training draws."""

import numpy as np
import pytest
import torch

from comfyui_personalize.models.lookahead import (
    DENOISING_ALPHA,
    PREVIEW_ALPHA,
    boundary_scalings,
    draw_timesteps,
    importance,
    preview,
)
from comfyui_personalize.models.schedules import NoiseSchedule


@pytest.mark.golden("lookahead", "07_lcm_single_step")
def test_one_step(case):
    settings, scaling = case.config["scheduler_base_config"], case.config["timestep_scaling"]
    assert settings["beta_schedule"] == "scaled_linear" and case.config["sigma_data"] == 0.5
    schedule = NoiseSchedule.scaled_linear(
        settings["prediction_type"],
        timesteps=settings["num_train_timesteps"],
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
    )
    sample, prediction, timesteps = (case.inputs[name] for name in ("sample", "model_output", "timesteps"))

    case.check("alphas_cumprod", schedule.alphas_cumprod)
    for name, value in zip(("c_skip", "c_out"), boundary_scalings(timesteps, timestep_scaling=scaling)):
        case.check(name, value)
    for name in sorted(case.unchecked):
        kind, _, clip = name.partition("_clip")  # "epsilon_clip0.8"
        if kind in ("epsilon", "v_prediction", "sample"):
            options = {"prediction_type": kind, "clip": float(clip) if clip else None, "timestep_scaling": scaling}
            case.check(name, preview(schedule, prediction, sample, timesteps, **options))
    case.check("add_noise", schedule.add_noise(sample, prediction, timesteps))
    case.check("ddpm_add_noise", schedule.add_noise(sample, prediction, timesteps))
    case.check("velocity", schedule.velocity(sample, prediction, timesteps))


@pytest.mark.golden("lookahead", "08_importance_sampling")
def test_timesteps(case):
    steps = len(case.expected["diffusion"])
    denoising = importance(steps, DENOISING_ALPHA)
    case.check("diffusion", denoising)
    for limit in case.config["lcm_max_timesteps"]:
        case.check(f"lcm_{limit}", importance(limit, PREVIEW_ALPHA))
    drawn = case.expected["draws_numpy_seed"]
    uniform = np.random.RandomState(case.config["np_seed"]).random_sample(len(drawn))
    case.check("draws_numpy_seed", draw_timesteps(denoising, torch.from_numpy(uniform)))
