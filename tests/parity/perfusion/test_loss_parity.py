"""The loss on the subject alone, and what it is computed from."""

import pytest

from comfyui_personalize.models.perfusion import masked_loss, resize_mask
from comfyui_personalize.models.schedules import NoiseSchedule


@pytest.mark.golden("perfusion", "masked_loss_*")
def test_masked_loss(case):
    inputs = case.inputs
    kind = {"eps": "epsilon", "v": "v_prediction"}[case.config["parameterization"]]
    schedule = NoiseSchedule.scaled_linear(kind)
    latents, noise, timesteps = (inputs[name] for name in ("x_start", "noise", "timesteps"))
    case.check("x_noisy", schedule.add_noise(latents, noise, timesteps))
    target = schedule.target(latents, noise, timesteps)
    mask = resize_mask(inputs["mask"], latents.shape[-2:])
    case.check("mask_resized", mask)
    prediction = inputs["model_output"].requires_grad_()
    loss = masked_loss(prediction, target, mask)
    loss.backward()
    case.check("loss", loss)
    case.check("grad_model_output", prediction.grad)
    case.check("loss_no_mask", masked_loss(prediction, target))
