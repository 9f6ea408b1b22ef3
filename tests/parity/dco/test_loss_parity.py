"""DCO's loss, noise and targets against what the authors' trainer computed."""

import pytest
import torch

from comfyui_personalize.models.dco import dco_loss
from comfyui_personalize.models.denoising import denoising_error
from comfyui_personalize.models.schedules import NoiseSchedule, offset_noise
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.dco.config import DCOConfig
from comfyui_personalize.trainers.dco.step import dco_step


def min_snr(schedule: NoiseSchedule, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor | None:
    return None if gamma is None else schedule.min_snr_weights(timesteps, gamma)


class Replayed(torch.nn.Module):
    """A UNet that answers what was recorded: the model's prediction, and the reference's where no gradient is kept."""

    def __init__(self, prediction: torch.Tensor, reference: torch.Tensor | None):
        super().__init__()
        self.prediction, self.reference = prediction, reference

    def forward(self, noisy, *_, **__):
        answer = self.prediction if torch.is_grad_enabled() else self.reference
        assert answer.shape == noisy.shape
        return (answer,)


def recorded_step(case, schedule, prediction, reference, *, class_rows: int = 0, snr_gamma: float | None = None):
    """The loss of our training step where the UNet gives the recorded predictions."""
    gamma = snr_gamma if snr_gamma is not None else case.config["snr_gamma"] or 0.0
    config = DCOConfig(
        beta=case.config["beta"],
        snr_gamma=gamma,
        prior_loss_weight=case.config.get("prior_loss_weight", 1.0),
    )
    told = Conditioning(torch.zeros(len(prediction), 1, 1))
    rows = {name: case.inputs[name] for name in ("latents", "noise", "timesteps")}
    unet = Replayed(prediction, reference)
    return dco_step(unet, schedule, config, **rows, policy=told, reference=told, class_rows=class_rows)


@pytest.mark.golden("dco", "dco_loss_eps", "dco_loss_eps_snr", "dco_loss_v", "dco_loss_v_snr")
def test_loss_and_gradient(case, schedule):
    beta, gamma = case.config["beta"], case.config["snr_gamma"]
    timesteps, reference = case.inputs["timesteps"], case.inputs["refer_pred"]
    target = schedule.target(case.inputs["latents"], case.inputs["noise"], timesteps)
    weights = min_snr(schedule, timesteps, gamma)
    prediction = case.inputs["model_pred"].requires_grad_()

    loss = dco_loss(prediction, reference, target, beta, weights=weights)
    (gradient,) = torch.autograd.grad(loss, prediction)

    case.check("loss", recorded_step(case, schedule, prediction, reference))

    model_error = denoising_error(prediction, target, weights)
    reference_error = denoising_error(reference, target, weights)
    case.check("target", target)
    case.check("loss", loss)
    case.check("grad_model_pred", gradient)
    case.check("loss_model", model_error)
    case.check("loss_refer", reference_error)
    case.check("inside_term", -beta * (model_error - reference_error))
    if gamma is not None:
        case.check("snr", schedule.snr(timesteps))
        case.check("mse_loss_weights", weights)


@pytest.mark.golden("dco", "dco_loss_prior", "dco_loss_prior_snr")
def test_loss_with_class_pictures(case, schedule):
    config, timesteps, prediction = case.config, case.inputs["timesteps"], case.inputs["model_pred"].requires_grad_()
    target = schedule.target(case.inputs["latents"], case.inputs["noise"], timesteps)
    subject, class_ = prediction.chunk(2)
    subject_target, class_target = target.chunk(2)
    reference = case.inputs["refer_pred"].chunk(2)[0]
    weights = min_snr(schedule, timesteps.chunk(2)[0], config["snr_gamma"])

    loss = recorded_step(case, schedule, prediction, reference, class_rows=len(class_))
    (gradient,) = torch.autograd.grad(loss, prediction)

    case.check("loss", loss)
    case.check("grad_model_pred", gradient)
    case.check("prior_loss", denoising_error(class_, class_target))
    case.check("loss_model", denoising_error(subject, subject_target, weights))
    case.check("loss_refer", denoising_error(reference, subject_target, weights))


@pytest.mark.golden("dco", "dco_loss_saturated")
def test_loss_far_from_and_at_equality(case):
    predictions = case.inputs["model_pred"].requires_grad_()
    losses = torch.stack(
        [
            dco_loss(prediction, reference, case.inputs["noise"], case.config["beta"])
            for prediction, reference in zip(predictions, case.inputs["refer_pred"], strict=True)
        ]
    )
    (gradient,) = torch.autograd.grad(losses.sum(), predictions)
    case.check("loss", losses)
    case.check("grad_model_pred", gradient)


@pytest.mark.golden("dco", "sft_loss_beta_off")
def test_plain_denoising_loss(case, schedule):
    timesteps = case.inputs["timesteps"]
    target = schedule.target(case.inputs["latents"], case.inputs["noise"], timesteps)
    for name, gamma in {"plain": 0.0, "snr": case.config["snr_gamma"]}.items():
        prediction = case.inputs["model_pred"].clone().requires_grad_()
        weights = min_snr(schedule, timesteps, gamma or None)
        case.check(f"loss_{name}", denoising_error(prediction, target, weights))
        loss = recorded_step(case, schedule, prediction, None, snr_gamma=gamma)
        (gradient,) = torch.autograd.grad(loss, prediction)
        case.check(f"loss_{name}", loss)
        case.check(f"grad_{name}", gradient)


@pytest.mark.golden("dco", "offset_noise_and_targets")
def test_noise_noisy_latents_and_targets(case, schedule):
    latents, timesteps = case.inputs["latents"], case.inputs["timesteps"]
    noise = offset_noise(case.inputs["z"], case.inputs["z_offset"], case.config["offset_noise"])
    case.check("alphas_cumprod", schedule.alphas_cumprod)
    case.check("noise", noise)
    case.check("noisy", schedule.add_noise(latents, noise, timesteps))
    for name, prediction_type in {"eps": "epsilon", "v": "v_prediction"}.items():
        target = NoiseSchedule(schedule.alphas_cumprod, prediction_type).target(latents, noise, timesteps)
        case.check(f"target_{name}", target)
