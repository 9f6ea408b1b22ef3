"""Whole training steps of the three methods against the authors' code, on their tiny models."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from comfyui_personalize.models.denoising import denoising_error
from comfyui_personalize.models.schedules import NoiseSchedule
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.config import TrainConfig
from comfyui_personalize.trainers.optimizer import ParameterGroup, make_optimizer
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.text import LearnedTokenEmbedding


class Models:
    """The authors' tiny models, with our embedding in the place of theirs."""

    def __init__(self, case):
        shared = case.sibling(case.config["weights_case"])
        weights = shared.weights
        self.unet = UNet2DConditionModel(**shared.config["unet_config"])
        self.unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items() if k.startswith("unet.")})
        self.unet.requires_grad_(False)
        text = {k.removeprefix("text."): v for k, v in weights.items() if k.startswith("text.")}
        concept = text.pop(next(key for key in text if key.endswith("concept_token")))
        self.text = CLIPTextModel(CLIPTextConfig(**shared.config["text_config"]))
        if not hasattr(self.text, "text_model"):  # transformers 5
            text = {key.removeprefix("text_model."): value for key, value in text.items()}
        self.text.load_state_dict(text)
        self.text.requires_grad_(False)
        self.embedding = LearnedTokenEmbedding(self.text.get_input_embeddings().weight, concept)
        self.text.set_input_embeddings(self.embedding)
        scheduler = case.config["scheduler"]
        self.schedule = NoiseSchedule.scaled_linear(
            timesteps=scheduler["num_train_timesteps"],
            beta_start=scheduler["beta_start"],
            beta_end=scheduler["beta_end"],
        )

    def prediction_and_target(self, inputs, step):
        latents, noise, timesteps = (inputs[f"{name}_{step}"] for name in ("latents", "noise", "timesteps"))
        told = Conditioning(self.text(inputs[f"input_ids_{step}"]).last_hidden_state)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        return predict(self.unet, noisy, timesteps, told), self.schedule.target(latents, noise, timesteps)


def optimizer_of(config, parameters):
    settings = TrainConfig(
        learning_rate=config["lr"],
        adam_beta1=config["betas"][0],
        adam_beta2=config["betas"][1],
        adam_epsilon=config["eps"],
        weight_decay=config["weight_decay"],
    )
    group = ParameterGroup("trained", parameters, settings.learning_rate, settings.weight_decay)
    return make_optimizer(settings, [group], Ranks())


@pytest.mark.golden("dvar", "ti_train_steps")
def test_textual_inversion_steps(case):
    models = Models(case)
    token = models.embedding.learned
    optimizer = optimizer_of(case.config, {"token": token})
    for step in range(case.config["steps"]):
        loss = denoising_error(*models.prediction_and_target(case.inputs, step))
        loss.backward()
        case.check(f"loss_{step}", loss)
        case.check(f"grad_concept_token_{step}", token.grad)
        optimizer.step()
        optimizer.zero_grad()
        case.check(f"concept_token_{step}", token)


@pytest.mark.golden("dvar", "tiny_sd_weights")
def test_the_weights_of_the_two_trainings_are_complete(case):
    models = Models(case.sibling("ti_train_steps"))
    case.check("n", torch.tensor(sum(parameter.numel() for parameter in models.unet.parameters())))
    table = models.embedding.weight
    assert case.config["placeholder_token_id"] == len(table)
    assert any(torch.equal(models.embedding.learned[0], row) for row in table)
