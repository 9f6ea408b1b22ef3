"""The CLIP plateau in the training loop: when it stops, what it says, that it resumes exactly, its settings."""

import json
import math
from pathlib import Path

import pytest
import torch

from comfyui_personalize.models.dvar import PRESETS
from comfyui_personalize.models.errors import ConfigError, FormatError, TrainingError
from comfyui_personalize.trainers import loop
from comfyui_personalize.trainers.checkpoint import GeneratorState, newest_states
from comfyui_personalize.trainers.config import TrainConfig, build
from comfyui_personalize.trainers.loop import ParameterGroup, train_loop
from comfyui_personalize.trainers.plateau import CLIPPlateau, PictureSettings
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.settings import RunSettings
from comfyui_personalize.trainers.stopping import DVAR, FixedSteps

CPU = torch.device("cpu")
PICTURES = PictureSettings(clip=Path("clip"))
RULE = CLIPPlateau(pictures=PICTURES, patience=1, eps=0.05, every=3)
BASE = {"base": {"path": "x"}, "dataset": {}, "output": {"name": "x"}}


class Scores:
    """Stands for sampling: the scores of the checks in order, by the weight that they see."""

    measure, higher_is_better = "clip", True

    def __init__(self, walk, scores):
        self.walk, self.scores, self.seen = walk, scores, []

    def run(self, cancelled):
        if cancelled():
            return None
        self.seen.append(self.walk.steps)
        return {"": self.scores[self.walk.steps // 3 - 1]}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Walk:
    """A weight that wanders at random."""

    def __init__(self, scores=(), rule=RULE):
        self.rule, self.generator = rule, torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.scores = Scores(self, scores)

    @property
    def steps(self):
        return round(float(self.weight.detach()[1] / -0.01))

    def step(self):
        return (self.weight * torch.stack([torch.randn((), generator=self.generator), torch.ones(())])).sum()

    def train(self, folder=None, *, progress=None, save=None, **settings):
        return train_loop(
            TrainConfig(**{"steps": 30, "learning_rate": 0.01, "checkpoint_every": 0, "weight_decay": 0.0} | settings),
            [ParameterGroup("g", {"w": self.weight}, 0.01, 0.0)],
            self.step,
            device=CPU,
            state={"generator": GeneratorState(self.generator)},
            stopping=self.rule,
            evaluation=self.scores if self.rule is not None else None,
            progress=progress,
            run_folder=folder,
            save=save,
        )


class CancelAt(SilentProgress):
    def __init__(self, question):
        self.left = question

    def cancelled(self):
        self.left -= 1
        return self.left <= 0


def test_it_stops_at_the_check_that_meets_it_and_says_why(tmp_path):
    walk, plain = Walk([0.5, 0.6, 0.62, 0.63, 0.9]), Walk(rule=None)
    result = walk.train(tmp_path)
    assert (result.stopped_by, result.steps, walk.scores.seen) == ("rule", 12, [3, 6, 9, 12])
    assert (
        "CLIP plateau: the similarity to the pictures did not rise by more than 0.05 above 0.600; checks in a row, "
        "3 steps apart: 2"
    ) in result.summary
    assert result.criterion.values == [(3, 0.5), (6, 0.6), (9, 0.62), (12, 0.63)] and result.evaluations == []
    assert (result.criterion.label, result.criterion.stopped_at) == ("CLIP similarity", 12)
    assert result.criterion.threshold == pytest.approx(0.65)
    plain.train(steps=12)
    assert torch.equal(walk.weight, plain.weight)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["clip"]) for line in lines if "clip" in line] == [
        (4, 0.5), (7, 0.6), (10, 0.62), (12, 0.63)
    ]  # fmt: skip
    assert sum("loss" in line for line in lines) == 12


def test_the_last_weights_are_checked_too():
    walk = Walk([0.1, 0.9, 0.2])
    result = walk.train(steps=9)
    assert (result.stopped_by, walk.scores.seen) == ("steps", [3, 6, 9])
    assert "the CLIP plateau was not met: the similarity last rose to 0.900; checks since then: 1" in result.summary


def test_the_best_weights_are_those_of_the_highest_similarity():
    walk, plain = Walk([0.1, 0.9, 0.2, 0.3]), Walk(rule=None)
    result = walk.train(keep="best")
    plain.train(steps=6)
    assert (result.best_step, result.steps) == (6, 12) and torch.equal(walk.weight, plain.weight)


@pytest.mark.parametrize("question", range(1, 17))
def test_cancel_and_resume_equal_one_run(question, tmp_path):
    scores = [0.5, 0.7, 0.71, 0.72, 0.9]
    whole, first, second = Walk(scores), Walk(scores), Walk(scores)
    expected = whole.train(tmp_path / "whole", keep="best")
    part = first.train(tmp_path / "parts", progress=CancelAt(question), keep="best")
    assert part.stopped_by == "cancelled"
    rest = second.train(tmp_path / "parts", keep="best", resume=True)
    assert (rest.steps, rest.stopped_by, rest.best_step) == (12, "rule", expected.best_step)
    assert rest.losses == expected.losses and rest.criterion == expected.criterion
    assert torch.equal(whole.weight, second.weight)
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_state_from_before_the_deciding_check_comes_to_the_same_end(tmp_path):
    scores = [0.5, 0.5, 0.5, 0.5]
    first, again = Walk(scores), Walk(scores)
    expected = first.train(tmp_path, checkpoint_every=9)
    before = (tmp_path / "log.jsonl").read_bytes()
    assert newest_states(tmp_path)[0].name == "state-00000009.safetensors"
    result = again.train(tmp_path, resume=True)
    assert (result.stopped_by, result.steps, again.scores.seen) == ("rule", expected.steps, [9])
    assert torch.equal(first.weight, again.weight) and (tmp_path / "log.jsonl").read_bytes() == before


def test_a_score_that_is_no_number_is_left_out():
    walk = Walk([0.5, math.nan, 0.7, 0.7, 0.7])
    result = walk.train(keep="best")
    assert [steps for steps, _ in result.criterion.values] == [3, 9, 12, 15] and result.best_step == 9


def test_a_check_is_time_spent_though_the_step_after_it_is_cancelled(monkeypatch):
    clock, walk = iter(range(1000)), Walk()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    walk.scores.run = lambda cancelled: {"": [next(clock) for _ in range(100)][0]}
    result = walk.train(progress=CancelAt(4))
    assert (result.stopped_by, result.steps) == ("cancelled", 3) and 0.9 < result.evaluation_share < 1


def test_a_budget_that_it_cannot_stop_is_said_before_and_after():
    heard = []

    class Listener(SilentProgress):
        def report(self, step, total, message="", preview=None):
            heard.append(message)

    result = Walk([0.5, 0.5]).train(steps=8, progress=Listener())
    message = (
        "the CLIP plateau could not stop this run: it needs 3 checks, so 9 steps, and the budget is 8; lower patience "
        "or every, or allow more steps"
    )
    assert message in heard[0] and message in result.summary and result.stopped_by == "steps"
    assert heard.count("measuring CLIP similarity") == 2 and "loss" in heard[-1] and "clip 0.500" in heard[-1]


def test_a_recipe_that_samples_no_pictures_says_so():
    walk = Walk()
    walk.scores = None
    with pytest.raises(TrainingError, match="needs evaluations, which this training does not make"):
        walk.train()


# Settings


def test_settings_that_cannot_work_are_refused():
    for settings, message in (
        ({"eps": 0.0}, "eps must be above 0 and at most 1"),
        ({"eps": -0.1}, "eps must be above 0 and at most 1"),
        ({"eps": math.nan}, "eps must be above 0 and at most 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"patience": -1}, "patience and eps must be 0 or more"),
        ({"max_steps": -1}, "max_steps must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            CLIPPlateau(pictures=PICTURES, **settings)
    for settings, message in (
        ({"count": 0}, "count must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"seed": -1}, "seed must be between"),
    ):
        with pytest.raises(ConfigError, match=message):
            PictureSettings(clip=Path("clip"), **settings)


def test_a_missing_clip_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        with pytest.raises(FormatError, match=f"{name}: no CLIP there .* put config.json, model.safetensors"):
            PictureSettings(clip=tmp_path / name).check()


def test_prompts_are_the_training_s_own_unless_some_are_given():
    shown = [f"a <dog> {number}" for number in range(20)]
    chosen = PICTURES.choose(shown)
    assert len(set(chosen)) == 8 and set(chosen) <= set(shown) and chosen == PICTURES.choose(shown)
    assert chosen != PictureSettings(clip=Path("clip"), seed=1).choose(shown)
    assert PICTURES.choose(["x", "y"]).count("x") == 4
    assert PictureSettings(clip=Path("clip"), count=3, prompts=("a", "b")).choose(shown) == ["a", "b", "a"]


def test_what_decides_the_course_is_in_the_identity(tmp_path):
    (tmp_path / "clip.safetensors").write_bytes(b"12")
    other = PictureSettings(clip=tmp_path / "clip.safetensors")
    rules = [RULE, CLIPPlateau(pictures=PICTURES), CLIPPlateau(pictures=PICTURES, every=7)]
    rules += [CLIPPlateau(pictures=PICTURES, eps=0.2), CLIPPlateau(pictures=other), DVAR(), FixedSteps()]
    assert len({rule.identity() for rule in rules}) == 7
    before = other.identity()
    other.clip.write_bytes(b"123")
    assert other.identity() != before
    assert (CLIPPlateau(pictures=PICTURES, max_steps=7).limit(9), RULE.limit(9)) == (7, 9)


def test_the_authors_numbers():
    assert [(p.clip_sampling_steps, p.clip_guidance) for p in PRESETS.values()] == [(50, 7.5), (50, 6.0), (200, 6.0)]
    assert (PICTURES.count, PICTURES.seed, CLIPPlateau(pictures=PICTURES).every) == (8, 37, 50)


def test_the_config_file_names_the_rule():
    def stopping(table):
        return build(RunSettings, BASE | {"stopping": table}).stopping

    assert stopping({"eps": 0.2}) == stopping({"rule": "dvar", "eps": 0.2}) == DVAR(eps=0.2)
    assert stopping({"rule": "fixed", "steps": 5}) == FixedSteps(5)
    table = {"rule": "clip", "patience": 2, "pictures": {"clip": "here", "prompts": ["a <dog>"]}}
    rule = stopping(table)
    assert rule.patience == 2 and rule.pictures == PictureSettings(clip=Path("here"), prompts=("a <dog>",))
    for table, message in (
        ({"rule": "luck"}, "stopping.rule must be one of dvar, clip, fixed, got 'luck'"),
        ({"rule": "clip"}, "stopping lacks pictures"),
        ({"rule": "clip", "window": 3, "pictures": {"clip": "x"}}, "unknown setting.s. window in stopping"),
        (5, "stopping must be a table of settings, got 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            stopping(table)
