"""Grids of people and evaluations while a face encoder is trained, and the best weights by the latter."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.trainers.lookahead import sampling
from comfyui_personalize.trainers.lookahead.config import LookaheadConfig
from comfyui_personalize.trainers.lookahead.data import FaceSet
from comfyui_personalize.trainers.lookahead.evaluation import EvaluateEvery, LookaheadEvaluation
from comfyui_personalize.trainers.lookahead.losses import Seen, make_losses
from comfyui_personalize.trainers.lookahead.validation import CELL, LINE, draw_grid

GRID = {"preview_every": 2, "preview_people": 1, "preview_steps": 1}


@pytest.fixture
def strangers(people, tmp_path):
    """A set of one person that no training has met."""
    folder = tmp_path / "strangers"
    shutil.copytree(people / "bob", folder)
    return FaceSet(folder=folder, prompt_in_filename=True)


def test_a_grid_has_a_row_for_each_person_and_changes_nothing(tiny, strangers, monkeypatch):
    monkeypatch.setattr(sampling, "LCM_STEPS", 2)
    data = tiny.data(drawn={"validation": strangers, "validation_prompts": ("a face on the moon",)})
    shown = tiny.train(data, steps=2, name="shown", **GRID)
    plain = tiny.train(data, steps=2, name="plain")
    assert shown.train.losses == plain.train.losses
    first, second = load_file(shown.files[0]), load_file(plain.files[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plain.preview is None and shown.preview.width == 6 * CELL
    assert shown.preview.height > 2 * CELL
    saved = Image.open(tiny.place("shown").run_folder / "preview-000002.jpg")
    assert saved.size == shown.preview.size


def test_a_grid_without_looking_ahead_has_no_columns_of_the_lcm(tiny):
    result = tiny.train(steps=1, lookahead_every=0, models={"lcm_lora": None}, **GRID | {"preview_every": 1})
    assert result.preview.width == 4 * CELL


def test_captions_stand_below_their_pictures():
    red = Image.new("RGB", (8, 8), "red")
    sheet = draw_grid(
        ("one", "two"), [[(red, "a short caption"), (None, "")], [(red, "word " * 40), (red, "")]], side=64
    )
    assert sheet.size == (128, 2 * LINE + (64 + LINE + LINE // 2) + (64 + 4 * LINE + LINE // 2))
    assert sheet.getpixel((32, 2 * LINE + 32)) == (255, 0, 0) and sheet.getpixel((96, 2 * LINE + 32)) == (255,) * 3
    caption = sheet.crop((0, 2 * LINE + 64, 64, 3 * LINE + 64)).convert("L")
    assert caption.getextrema()[0] < 128


def test_the_best_evaluation_is_kept(tiny, monkeypatch):
    values = iter([1.0, 0.2, 0.7])
    monkeypatch.setattr(LookaheadEvaluation, "run", lambda self, cancelled: {"": next(values)})
    best = tiny.train(steps=2, name="best", evaluate_every=1, keep="best")
    assert best.train.best_step == 1 and best.train.evaluations[0] == (0, 1.0)
    first = tiny.train(steps=1, name="first")
    kept, expected = load_file(best.files[0]), load_file(first.files[0])
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_evaluations_repeat_and_leave_training_as_it_is(tiny, strangers):
    data = tiny.data(drawn={"validation": strangers, "random_target_chance": 0.5})
    watched = tiny.train(data, steps=1, name="watched", evaluate_every=1, evaluation_pairs=3, learning_rate=1e-12,
                         adapter_learning_rate=1e-12, weight_decay=0.0)  # fmt: skip
    plain = tiny.train(data, steps=1, name="plain", learning_rate=1e-12, adapter_learning_rate=1e-12, weight_decay=0.0)
    assert watched.train.losses == plain.train.losses
    lines = [json.loads(line) for line in (tiny.place("watched").run_folder / "log.jsonl").read_text().splitlines()]
    found = [line["evaluation"] for line in lines if "evaluation" in line]
    assert found[0] > 0 and all(math.isclose(found[0], value, rel_tol=1e-5) for value in found)


def test_evaluations_come_before_the_first_and_after_the_last_step():
    state = EvaluateEvery(10, 4).start(1)
    wanted = []
    for step in range(11):
        if state.wants_evaluation(step):
            wanted.append(step)
            state.evaluated(step, 1.0)
            assert not state.wants_evaluation(step)
    assert wanted == [0, 4, 8, 10] and not state.stopped
    again = EvaluateEvery(10, 4).start(1)
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert not again.wants_evaluation(10)
    with pytest.raises(ConfigError, match="evaluate_every is above 0"):
        LookaheadConfig(keep="best")


def test_a_preview_without_a_face_is_no_likeness(models):
    points = torch.tensor([[12.0, 13], [20, 13], [16, 18], [13, 22], [19, 22]])
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    faces = iter([points, None, None] * 2)
    loss = make_losses(LookaheadConfig(), models, lambda picture: next(faces), torch.device("cpu"))["identity"][1]
    seen = {"pictures": pictures, "references": pictures, "landmarks": [points, points, None], "prompts": [""] * 3}
    assert float(loss(Seen(**seen))) == pytest.approx(0, abs=1e-5)
    assert float(loss(Seen(**seen, faceless=1.0))) == pytest.approx(0.5, abs=1e-5)  # two references have a face
