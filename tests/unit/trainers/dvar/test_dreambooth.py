"""DreamBooth-LoRA on tiny checkpoints: what trains, prior preservation, exact resume, DVAR."""

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.dvar import EvaluationSettings
from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.formats import read_header
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.dvar import dreambooth, train
from comfyui_personalize.trainers.dvar.config import DreamBoothConfig
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.stopping import DVAR

DOG = LearnedToken("<dog>", "dog")


@pytest.fixture
def run(tiny):
    return lambda *arguments, **keywords: tiny.train(dreambooth, DreamBoothConfig, *arguments, **keywords)


def tensors(result):
    return {(path.parent.name, key): value for path in result.files for key, value in load_file(path).items()}


def equal(first, second):
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class CancelAt(SilentProgress):
    def __init__(self, step):
        self.step, self.flag = step, False

    def report(self, step, total, message="", preview=None):
        self.flag = self.flag or (step == self.step and message.startswith("loss"))

    def cancelled(self):
        return self.flag


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_lora_and_a_token_are_saved(family, run, monkeypatch):
    unets, load = [], TrainingBase.load_unet

    def load_unet(*arguments):
        unet = load(*arguments)
        unets.append((unet, {key: value.clone() for key, value in unet.state_dict().items()}))
        return unet

    monkeypatch.setattr(TrainingBase, "load_unet", load_unet)
    result = run(family, rank=2)
    assert [(path.parent.name, path.name) for path in result.files] == [
        ("main", "my_dog.safetensors"),
        ("embeddings", "my_dog.safetensors"),
    ]
    header = read_header(result.files[0])
    assert header.format == "lora/1" and header.metadata["personalize.method"] == "dreambooth"
    stored = load_file(result.files[0])
    assert all(key.startswith("lora_unet_") for key in stored)
    assert any("lora_up" in key and value.abs().max() > 0 for key, value in stored.items())
    unet, before = unets[0]
    names = dict(unet.named_parameters())
    for key, value in before.items():
        kept = names.get(
            key, names.get(key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
        )
        assert torch.equal(kept, value)
    assert {name.split(".lora_")[1][0] for name, p in names.items() if p.requires_grad} == {"A", "B"}


def test_prior_preservation_adds_the_error_of_the_class(run, tiny, monkeypatch):
    losses, plain = [], train.denoising_error
    monkeypatch.setattr(train, "denoising_error", lambda *a: losses.append(plain(*a)) or losses[-1])
    batches, following = [], LatentBatches.next
    monkeypatch.setattr(LatentBatches, "next", lambda self: batches.append(following(self)) or batches[-1])
    result = run(dataset=tiny.dataset(DOG, class_caption="a photo of a dog"), prior_loss_weight=0.25, steps=1)
    instance, prior = losses
    assert result.train.losses == [pytest.approx(float(instance + 0.25 * prior), rel=1e-6)]
    assert len(batches[0].draws) == 2 and len(batches[0].latents) == 4


def test_without_a_token_captions_are_trained_and_the_text_encoders_leave(run, tiny):
    with pytest.raises(ConfigError, match="prompts from object templates name a token, and the dataset has none"):
        run(dataset=tiny.dataset())
    result = run(dataset=tiny.dataset(captions="a photo of sks dog"), prompts="captions")
    assert [path.parent.name for path in result.files] == ["main"]


def test_the_loss_falls_on_a_fixed_batch_and_dvar_stops(run):
    evaluation = EvaluationSettings(batch_size=3, mean_latent=True)
    losses = run(steps=25, name="a", stopping=DVAR(window=100, every=1, evaluation=evaluation)).train.evaluations
    assert losses[-1][1] < losses[0][1]
    stopped = run(steps=40, name="b", stopping=DVAR(window=3, eps=1.0, every=1, evaluation=evaluation)).train
    assert stopped.stopped_by == "rule" and stopped.steps < 40


def test_cancel_and_resume_equal_one_run(run, tiny):
    settings = {"steps": 4, "crop": "random", "dataset": tiny.dataset(DOG, class_caption="a dog")}
    whole = run(name="whole", **settings)
    part = run(name="parts", progress=CancelAt(2), **settings)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = run(name="parts", resume=True, **settings)
    assert rest.train.losses == whole.train.losses and equal(rest, whole)
