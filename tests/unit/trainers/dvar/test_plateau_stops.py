"""The CLIP plateau in trainings of the three methods: the same weights with and without it, exact resume, memory."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_personalize.models.errors import ConfigError, FormatError
from comfyui_personalize.trainers import likeness
from comfyui_personalize.trainers.dvar import custom_diffusion, dreambooth, textual_inversion
from comfyui_personalize.trainers.dvar.config import CustomDiffusionConfig, DreamBoothConfig, TextualInversionConfig
from comfyui_personalize.trainers.pictures import Picture
from comfyui_personalize.trainers.plateau import CLIPPlateau, PictureSettings
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.stopping import DVAR

RECIPES = {
    "textual inversion": (textual_inversion, TextualInversionConfig, {}),
    "dreambooth": (dreambooth, DreamBoothConfig, {"rank": 2, "save_precision": "fp32"}),
    "custom diffusion": (
        custom_diffusion,
        CustomDiffusionConfig,
        {"snr_gamma": 0.0, "rescale_variants": 0, "save_precision": "fp32"},
    ),
}


@pytest.fixture
def rule(tiny_clip):
    """rule(count=…, …): few pictures in one sampling step, every two steps, never satisfied with what it sees."""

    def make(*, count=3, **settings):
        pictures = PictureSettings(clip=tiny_clip, count=count, steps=1, guidance=2.0)
        return CLIPPlateau(pictures=pictures, **{"patience": 1, "eps": 1.0, "every": 2} | settings)

    return make


@pytest.fixture
def train(tiny):
    def run(method, family="sd15", **more):
        recipe, config, settings = RECIPES[method]
        return tiny.train(recipe, config, family, **settings | more)

    return run


def equal(first, second):
    pairs = [(load_file(one), load_file(two)) for one, two in zip(first.files, second.files, strict=True)]
    return all(one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one) for one, two in pairs)


class CancelWhileSampling(SilentProgress):
    """Cancels within the second check, of three questions, after step 4."""

    def __init__(self):
        self.steps, self.questions = 0, 0

    def report(self, step, total, message="", preview=None):
        self.steps = step if message.startswith("loss") else self.steps

    def cancelled(self):
        self.questions += self.steps == 4
        return self.questions > 1


@pytest.mark.parametrize("method", RECIPES)
def test_it_stops_changes_nothing_and_resumes_exactly(method, train, rule):
    stopped = train(method, name="stopped", steps=20, stopping=rule())
    assert (stopped.train.stopped_by, stopped.train.steps) == ("rule", 6)
    assert [steps for steps, _ in stopped.train.criterion.values] == [2, 4, 6]
    assert len({value for _, value in stopped.train.criterion.values}) == 3  # the pictures follow the weights
    assert "checks in a row, 2 steps apart: 2" in stopped.train.summary
    assert equal(stopped, train(method, name="plain", steps=6))
    part = train(method, name="parts", steps=20, stopping=rule(), progress=CancelWhileSampling())
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 4)
    rest = train(method, name="parts", steps=20, stopping=rule(), resume=True)
    assert rest.train.criterion == stopped.train.criterion and equal(rest, stopped)


def test_a_changed_rule_is_not_resumed(train, rule):
    train("textual inversion", steps=20, stopping=rule(), progress=CancelWhileSampling())
    for other in (rule(patience=5), rule(count=2), DVAR(), None):
        with pytest.raises(ConfigError, match="other settings, pictures, base model or stopping rule; restore them"):
            train("textual inversion", steps=20, stopping=other, resume=True)


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_other_families_and_the_best_weights(family, train, rule, monkeypatch):
    scores = iter([0.2, 0.8, 0.3, 0.3])
    monkeypatch.setattr(likeness.Likeness, "__call__", lambda self, pictures: next(scores))
    result = train("dreambooth", family, steps=20, stopping=rule(eps=0.1), keep="best")
    assert (result.train.steps, result.train.best_step) == (8, 4)
    monkeypatch.undo()
    assert equal(result, train("dreambooth", family, name="plain", steps=4))


def test_networks_wait_off_the_device(train, rule, monkeypatch):
    seen, sampled = [], likeness.PictureScore.run

    def run(self, cancelled):
        seen.append((self._vae.device.type, next(self._likeness._judge.network.parameters()).device.type))
        names = {name.split(".")[0] for name, _ in self._likeness._judge.network.named_parameters()}
        assert names & {"vision_model", "text_model"} == {"vision_model"}  # what reads words has gone
        return sampled(self, cancelled)

    monkeypatch.setattr(likeness.PictureScore, "run", run)
    train("textual inversion", steps=3, stopping=rule())
    assert seen == [("cpu", "cpu")]


def test_a_clip_that_is_not_there_is_refused_before_a_model_is_loaded(tiny, train, rule, tmp_path):
    wrong = CLIPPlateau(pictures=PictureSettings(clip=tmp_path / "none"))
    with pytest.raises(FormatError, match="none: no CLIP there for the CLIP plateau to compare pictures with"):
        train("textual inversion", stopping=wrong)
    assert not (tiny.folder / "out").exists()


def test_pictures_are_alike_by_the_mean_over_all_pairs(tiny, tiny_clip, tmp_path):
    from comfyui_personalize.trainers.scoring import load_clip_judge

    dataset = tiny.dataset()
    pictures = [example.picture.open().rgb for example in dataset.examples]
    rows = torch.nn.functional.normalize(load_clip_judge(tiny_clip).embed_images(pictures), dim=1)
    found = likeness.Likeness(tiny_clip, dataset, torch.device("cpu"))(pictures[:2])
    assert found == pytest.approx(float((rows[:2] @ rows.T).mean()), abs=1e-6)
    # A single file of the image encoder, as the host keeps it, says the same; real sizes need no settings.
    weights = load_file(tiny_clip / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "text" not in name}, tmp_path / "vision.safetensors")
    settings = json.loads((tiny_clip / "config.json").read_text())
    (tmp_path / "vision.json").write_text(
        json.dumps(settings["vision_config"] | {"projection_dim": settings["projection_dim"]})
    )
    single = likeness.Likeness(tmp_path / "vision.safetensors", dataset, torch.device("cpu"))
    assert single(pictures[:2]) == pytest.approx(found, abs=1e-5)


def test_the_datasets_pictures_are_not_open_together(tiny, tiny_clip, monkeypatch):
    dataset, opened, most, open_one = tiny.dataset(), [], [], Picture.open
    whole = likeness.Likeness(tiny_clip, dataset, torch.device("cpu"))

    def watched(picture):
        found = open_one(picture)
        opened.append(weakref.ref(found.rgb))
        most.append(sum(one() is not None for one in opened))
        return found

    monkeypatch.setattr(Picture, "open", watched)
    monkeypatch.setattr(likeness, "AT_ONCE", 2)
    parts = likeness.Likeness(tiny_clip, dataset, torch.device("cpu"))
    assert len(opened) == len(dataset.examples) == 3 and max(most) < 3
    torch.testing.assert_close(parts._references, whole._references, rtol=0, atol=1e-5)
