"""DCO's loss, noise and targets against what the authors' trainer computed."""

import pytest
import torch

from comfyui_personalize.models.dco import dco_loss, denoising_error
from comfyui_personalize.models.schedules import NoiseSchedule, offset_noise


def schedule_of(config: dict) -> NoiseSchedule:
    """The noise schedule of a case; a prediction type beside the scheduler's settings overrides them."""
    scheduler = config["scheduler"]
    assert scheduler["beta_schedule"] == "scaled_linear", "every Stable Diffusion base has this one"
    return NoiseSchedule.scaled_linear(
        config.get("prediction_type", scheduler["prediction_type"]),
        timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr", False),
    )


def min_snr(schedule: NoiseSchedule, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor | None:
    return None if gamma is None else schedule.min_snr_weights(timesteps, gamma)


@pytest.mark.golden("dco", "dco_loss_eps", "dco_loss_eps_snr", "dco_loss_v", "dco_loss_v_snr")
def test_loss_and_gradient(case):
    schedule, beta, gamma = schedule_of(case.config), case.config["beta"], case.config["snr_gamma"]
    timesteps, reference = case.inputs["timesteps"], case.inputs["refer_pred"]
    target = schedule.target(case.inputs["latents"], case.inputs["noise"], timesteps)
    weights = min_snr(schedule, timesteps, gamma)
    prediction = case.inputs["model_pred"].requires_grad_()

    loss = dco_loss(prediction, reference, target, beta, weights=weights)
    (gradient,) = torch.autograd.grad(loss, prediction)

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
def test_loss_with_class_pictures(case):
    schedule, config = schedule_of(case.config), case.config
    timesteps, prediction = case.inputs["timesteps"], case.inputs["model_pred"].requires_grad_()
    target = schedule.target(case.inputs["latents"], case.inputs["noise"], timesteps)
    subject, class_ = prediction.chunk(2)
    subject_target, class_target = target.chunk(2)
    reference = case.inputs["refer_pred"].chunk(2)[0]
    weights = min_snr(schedule, timesteps.chunk(2)[0], config["snr_gamma"])

    prior = denoising_error(class_, class_target)
    loss = dco_loss(subject, reference, subject_target, config["beta"], weights=weights)
    loss = loss + config["prior_loss_weight"] * prior
    (gradient,) = torch.autograd.grad(loss, prediction)

    case.check("loss", loss)
    case.check("grad_model_pred", gradient)
    case.check("prior_loss", prior)
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
def test_plain_denoising_loss(case):
    schedule, timesteps = schedule_of(case.config), case.inputs["timesteps"]
    target = schedule.target(case.inputs["latents"], case.inputs["noise"], timesteps)
    weights = {"plain": None, "snr": min_snr(schedule, timesteps, case.config["snr_gamma"])}
    for name, factor in weights.items():
        prediction = case.inputs["model_pred"].clone().requires_grad_()
        loss = denoising_error(prediction, target, factor)
        (gradient,) = torch.autograd.grad(loss, prediction)
        case.check(f"loss_{name}", loss)
        case.check(f"grad_{name}", gradient)


@pytest.mark.golden("dco", "offset_noise_and_targets")
def test_noise_noisy_latents_and_targets(case):
    schedule, latents, timesteps = schedule_of(case.config), case.inputs["latents"], case.inputs["timesteps"]
    noise = offset_noise(case.inputs["z"], case.inputs["z_offset"], case.config["offset_noise"])
    case.check("alphas_cumprod", schedule.alphas_cumprod)
    case.check("noise", noise)
    case.check("noisy", schedule.add_noise(latents, noise, timesteps))
    for name, prediction_type in {"eps": "epsilon", "v": "v_prediction"}.items():
        target = NoiseSchedule(schedule.alphas_cumprod, prediction_type).target(latents, noise, timesteps)
        case.check(f"target_{name}", target)
