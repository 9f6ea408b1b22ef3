"""DCO training that DVAR stops: the evaluation is cheap, changes nothing, and resumes exactly."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.dvar import EvaluationSettings
from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.plateau import CLIPPlateau, PictureSettings
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.stopping import DVAR


def never(**evaluation):
    """A rule that evaluates before every step and never stops the short runs of these tests."""
    return DVAR(window=100, every=1, evaluation=EvaluationSettings(**{"batch_size": 3} | evaluation))


# The window's share of the whole variance is below 1 as soon as the loss has once changed more than now.
SOON = DVAR(window=3, eps=1.0, every=1, evaluation=EvaluationSettings(batch_size=3, accumulation=2))


def equal(first, second):
    pairs = zip(first.files, second.files, strict=True)
    return all(
        torch.equal(a, b) for one, two in pairs for a, b in zip(load_file(one).values(), load_file(two).values())
    )


@pytest.fixture
def forwards(monkeypatch):
    """Rows of every forward pass of the UNet."""
    rows, load = [], TrainingBase.load_unet

    def load_unet(*arguments):
        unet = load(*arguments)
        unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        return unet

    monkeypatch.setattr(TrainingBase, "load_unet", load_unet)
    return rows


@pytest.mark.parametrize(
    ("family", "settings"), [("sd15", {}), ("sdxl", {"train_text_encoder": True, "gradient_checkpointing": True})]
)
def test_training_takes_the_same_course_with_and_without_evaluations(family, settings, tiny):
    plain = tiny.train(family, name="plain", **settings)
    rule = never(code="00000", mean_latent=True, intervals=True)
    watched = tiny.train(family, name="watched", stopping=rule, **settings)
    assert watched.train.losses == plain.train.losses and equal(plain, watched)
    assert len(watched.train.evaluations) == 3


def test_an_evaluation_is_one_forward_pass_of_cached_latents(tiny, inside, forwards):
    result = tiny.train(steps=3, stopping=never())
    # The base's prediction for the evaluation batch is made once; a step has one pass of base and policy each.
    assert forwards == [3, 3, 2, 2] + [3, 2, 2] * 2
    assert inside.encoded == 4
    losses = [loss for _, loss in result.train.evaluations]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)  # policy and base still agree
    assert losses[2] != losses[0]


def test_the_plain_loss_needs_no_base(tiny, forwards):
    tiny.train(steps=2, beta=-1, stopping=never(accumulation=2))
    assert forwards == [3, 3, 2] * 2


def test_it_stops_early_and_says_so_in_the_log(tiny):
    result = tiny.train(steps=30, stopping=SOON)
    assert result.train.stopped_by == "rule" and 4 <= result.train.steps < 30
    assert "DVAR: over the last 3 steps the evaluation loss had" in result.train.summary
    log = [json.loads(line) for line in (tiny.place().run_folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == result.train.steps and log[-1]["dvar"] < 1 and "evaluation" in log[-1]


class CancelAfter(SilentProgress):
    def __init__(self, step):
        self.step, self.reached = step, False

    def report(self, step, total, message="", preview=None):
        self.reached = self.reached or (message.startswith("loss") and step >= self.step)

    def cancelled(self):
        return self.reached


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cancel_and_resume_equal_one_run(family, tiny, class_pictures, dog):
    dataset = tiny.dataset(dog).with_class_folder(class_pictures, "a photo of a dog")
    settings = {"steps": 30, "crop": "random", "flip": True, "keep": "best", "stopping": SOON}
    whole = tiny.train(family, dataset, name="whole", **settings)
    assert whole.train.stopped_by == "rule"
    part = tiny.train(family, dataset, name="parts", progress=CancelAfter(2), **settings)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = tiny.train(family, dataset, name="parts", resume=True, **settings)
    assert (rest.train.steps, rest.train.stopped_by) == (whole.train.steps, "rule")
    assert rest.train.evaluations == whole.train.evaluations and rest.train.best_step == whole.train.best_step
    assert equal(whole, rest)


@pytest.mark.parametrize(("family", "tokens"), [("sd15", True), ("sdxl", False)])
def test_a_clip_plateau_stops_changes_nothing_and_resumes_exactly(family, tokens, tiny, dog, tiny_clip):
    pictures = PictureSettings(clip=tiny_clip, count=3, steps=1)
    settings = {"steps": 20, "keep": "best", "stopping": CLIPPlateau(pictures=pictures, patience=0, eps=1.0, every=2)}
    dataset = tiny.dataset(*([dog] if tokens else []))
    whole = tiny.train(family, dataset, name="whole", **settings)
    assert (whole.train.stopped_by, whole.train.steps) == ("rule", 4) and whole.train.best_step in (2, 4)
    assert len({value for _, value in whole.train.criterion.values}) == 2
    assert equal(whole, tiny.train(family, dataset, name="plain", steps=whole.train.best_step))
    part = tiny.train(family, dataset, name="parts", progress=CancelAfter(2), **settings)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = tiny.train(family, dataset, name="parts", resume=True, **settings)
    assert rest.train.criterion == whole.train.criterion and equal(whole, rest)


def test_what_cannot_be_evaluated_or_resumed_is_refused_before_anything_is_loaded(tiny, monkeypatch):
    tiny.train(steps=30, stopping=SOON, progress=CancelAfter(1))
    for name in ("load_unet", "load_vae", "load_text_encoders"):
        monkeypatch.setattr(TrainingBase, name, lambda *arguments: pytest.fail("loaded a model"))
    with pytest.raises(ConfigError, match="30 x 40 rows needs as many different timesteps, and there are 1000"):
        tiny.train(name="other", stopping=never(batch_size=40, accumulation=30))
    for other in (None, DVAR(window=3, eps=1.0, every=1)):
        with pytest.raises(ConfigError, match="was made with other settings"):
            tiny.train(steps=30, stopping=other, resume=True)
