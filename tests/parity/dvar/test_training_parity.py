"""Whole training steps of the three methods against the authors' code, on their tiny models."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from comfyui_personalize.models.custom_diffusion import read_custom_diffusion, write_authors_file
from comfyui_personalize.models.denoising import denoising_error
from comfyui_personalize.models.formats import read_torch_file
from comfyui_personalize.models.learned_embeddings import read_learned_embeddings
from comfyui_personalize.models.schedules import NoiseSchedule
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.config import TrainConfig
from comfyui_personalize.trainers.dvar.config import CustomDiffusionConfig
from comfyui_personalize.trainers.dvar.custom_diffusion import attach_cross_attention, custom_loss, learning_rate
from comfyui_personalize.trainers.optimizer import ParameterGroup, clip_gradients, make_optimizer
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


@pytest.mark.golden("dvar", "custom_train_steps")
def test_custom_diffusion_steps(case):
    models, config = Models(case), case.config
    token, projections = models.embedding.learned, attach_cross_attention(models.unet)
    optimizer = optimizer_of(config, {"token": token, **projections})
    for step in range(config["steps"]):
        prediction, target = models.prediction_and_target(case.inputs, step)
        batch = SimpleNamespace(masks=case.inputs[f"mask_{step}"], draws=range(len(prediction) // 2))
        loss = custom_loss(CustomDiffusionConfig(), prediction, target, batch, None)
        loss.backward()
        case.check(f"loss_{step}", loss)
        clip_gradients([token, *projections.values()], config["clip_norm"])
        case.check(f"grad_concept_token_{step}_clipped", token.grad)
        optimizer.step()
        optimizer.zero_grad()
        case.check(f"concept_token_{step}", token)
    for name, parameter in projections.items():
        case.check(f"unet_final.{name}", parameter)


@pytest.mark.golden("dvar", "custom_trainable_names")
def test_what_custom_diffusion_trains(case):
    tiny = UNet2DConditionModel(**case.config["unet_config"]).requires_grad_(False)
    assert sorted(attach_cross_attention(tiny)) == sorted(case.config["tiny"])
    assert sorted(n for n, p in tiny.named_parameters() if p.requires_grad) == sorted(case.config["tiny"])
    with torch.device("meta"):
        full = UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
    found = {name: list(parameter.shape) for name, parameter in attach_cross_attention(full).items()}
    assert found == case.config["sd15"]
    case.check("n_sd15", torch.tensor(len(found)))
    case.check("n_sd15_elements", torch.tensor(sum(height * width for height, width in found.values())))


@pytest.mark.golden("dvar", "lr_scaling")
def test_learning_rates(case):
    class Some(Ranks):
        pass

    rates = []
    for scaled, prior, rate, accumulation, batch, processes in case.inputs["settings"].tolist():
        config = CustomDiffusionConfig(
            learning_rate=rate,
            scale_learning_rate=bool(scaled),
            gradient_accumulation=int(accumulation),
            batch_size=int(batch),
        )
        dataset, ranks = SimpleNamespace(class_examples=(1,) if prior else ()), Some()
        ranks.count = int(processes)
        parameter = {"p": torch.nn.Parameter(torch.zeros(1))}
        group = ParameterGroup("unet", parameter, learning_rate(config, dataset), 0.0)
        rates.append(make_optimizer(config, [group], ranks).param_groups[0]["lr"])
    case.check("lr", torch.tensor(rates, dtype=case.expected["lr"].dtype))


@pytest.mark.golden("dvar", "saved_files")
def test_the_authors_files_are_read_and_written(case, tmp_path):
    words, delta = (case.file(name) for name in case.config["files"])
    (word,) = read_learned_embeddings(words)
    assert list(case.config["embeds_layout"]) == [word.trigger]
    case.check("learned_embeds", word.rows["any"])
    changed = read_custom_diffusion(delta)
    assert changed.weights.keys() == case.config["delta_layout"]["unet"].keys()
    for name, weight in changed.weights.items():
        case.check(f"delta.unet.{name}", weight)
    case.check("delta.modifier_token", changed.tokens[0].rows["any"][0])

    again = read_torch_file(write_authors_file(tmp_path / "delta.bin", changed))
    original = read_torch_file(delta)
    assert again.keys() == original.keys()
    for part, values in original.items():
        assert all(torch.equal(again[part][name], value) for name, value in values.items())
