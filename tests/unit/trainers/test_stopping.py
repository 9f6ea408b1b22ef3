"""DVAR in the training loop: its cost, when it stops, that it changes nothing else, and that it resumes exactly."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_personalize.models.dvar import PRESETS, EvaluationSettings
from comfyui_personalize.models.errors import ConfigError, TrainingError
from comfyui_personalize.trainers.checkpoint import GeneratorState, newest_states
from comfyui_personalize.trainers.config import TrainConfig
from comfyui_personalize.trainers.evaluation import Evaluation
from comfyui_personalize.trainers.loop import ParameterGroup, train_loop
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.stopping import DVAR, EVALUATION_SHARE, STEP_COST, FixedSteps

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[2]
RECORDED = TESTS / "parity" / "data" / "dvar"
SHORTER = 5
"""By how much trainings on the small world are shorter than the authors'."""
MEASURED = TESTS / "benchmarks" / "dvar_losses.safetensors"


class Pictures:
    """Three pictures as a latent cache gives them."""

    def __len__(self):
        return 3

    def moments(self, index):
        mean = torch.linspace(-1, 1, 16).reshape(4, 2, 2) * (index + 1)
        return mean, torch.full_like(mean, 0.1)


class Denoiser:
    """One gain per channel that learns to tell the noise from what is added to it; it converges and then jitters."""

    def __init__(self, rule=None, seed=5):
        self.rule = rule
        self.generator = torch.Generator().manual_seed(seed)
        self.gain = torch.nn.Parameter(torch.zeros(4))
        self.evaluated = 0

    def error(self, latents, noise):
        return ((latents + noise) * self.gain[:, None, None] - noise).square().mean()

    def step(self):
        latents = torch.stack([Pictures().moments(index)[0] for index in range(3)])
        return self.error(latents, torch.randn(latents.shape, generator=self.generator))

    def loss(self, batch):
        assert not torch.is_grad_enabled()
        self.evaluated += 1
        return self.error(batch.latents, batch.noise)

    def train(self, folder=None, *, progress=None, save=None, **settings):
        evaluation = None
        if self.rule is not None and self.rule.evaluation is not None:
            evaluation = Evaluation(self.rule.evaluation, Pictures(), timesteps=1000, seed=0, loss=self.loss)
        return train_loop(
            TrainConfig(**{"steps": 400, "learning_rate": 0.01, "checkpoint_every": 0} | settings),
            [ParameterGroup("g", {"gain": self.gain}, 0.01, 0.0)],
            self.step,
            device=CPU,
            state={"generator": GeneratorState(self.generator)},
            stopping=self.rule,
            evaluation=evaluation,
            progress=progress,
            run_folder=folder,
            save=save,
        )


RULE = DVAR(window=60, eps=0.05, every=2)


class Watcher(SilentProgress):
    """Hears everything; cancels at the question with the given number."""

    def __init__(self, cancel_at=None):
        self.messages, self.asked, self.cancel_at = [], 0, cancel_at

    def report(self, step, total, message="", preview=None):
        self.messages.append(message)

    def cancelled(self):
        self.asked += 1
        return self.cancel_at is not None and self.asked >= self.cancel_at


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_stops_a_converged_run_and_says_why(tmp_path):
    progress = Watcher()
    denoiser = Denoiser(RULE)
    result = denoiser.train(tmp_path, progress=progress)
    assert result.stopped_by == "rule" and 60 < result.steps < 400 and result.steps % 2 == 1
    assert result.evaluations == [(steps, loss) for steps, (_, loss) in zip(range(0, 400, 2), result.evaluations)]
    assert denoiser.evaluated == len(result.evaluations) == result.steps // 2 + 1
    log = logged(tmp_path)
    assert [line["step"] for line in log if "dvar" in line] == list(range(1, result.steps + 1, 2))
    values = [line["dvar"] for line in log if "dvar" in line]
    assert values[:30] == [1.0] * 30 and values[-1] < 0.05 <= min(values[:-1])
    assert [line["evaluation"] for line in log if "dvar" in line] == [loss for _, loss in result.evaluations]
    assert f"over the last 60 steps the evaluation loss had {values[-1]:.3f} of its whole variance, less than 0.05" in (
        result.summary
    )
    assert result.criterion.values == [(steps, value) for steps, value in zip(range(0, 400, 2), values)]
    criterion = result.criterion
    assert (criterion.label, criterion.threshold, criterion.stopped_at) == ("normalized variance", 0.05, result.steps)
    assert f"dvar {values[-1]:.3f}" in progress.messages[-1]
    assert 0 < result.evaluation_share < 1 and "of the time for evaluations" in result.summary


@pytest.mark.parametrize("code", ["11111", "00000"])
def test_training_takes_the_same_course_with_and_without_it(code):
    rule = DVAR(window=1000, eps=0.05, every=1, evaluation=EvaluationSettings(code=code, accumulation=2))
    plain, watched = Denoiser(), Denoiser(rule)
    expected, result = plain.train(steps=50), watched.train(steps=50)
    assert watched.evaluated == 100 and len(result.evaluations) == 50
    assert torch.equal(plain.gain, watched.gain) and expected.losses == result.losses
    assert plain.generator.get_state().equal(watched.generator.get_state())


def test_the_step_at_which_it_fires_is_still_taken():
    stopped = Denoiser(RULE)
    result = stopped.train()
    plain = Denoiser()
    plain.train(steps=result.steps)
    assert result.evaluations[-1][0] == result.steps - 1
    assert torch.equal(plain.gain, stopped.gain)


@pytest.mark.parametrize("code", ["11111", "00000"])
@pytest.mark.parametrize("question", [1, 2, 40, 121, 122, 150])
def test_cancel_and_resume_equal_one_run(question, code, tmp_path):
    # Each evaluation asks four times here, each step once: some of these fall between two passes of an evaluation.
    rule = DVAR(window=60, eps=0.05, every=2, evaluation=EvaluationSettings(code=code, accumulation=4))
    settings = {"keep": "best", "steps": 120}
    whole, first, second = (Denoiser(rule) for _ in range(3))
    expected = whole.train(tmp_path / "whole", **settings)
    part = first.train(tmp_path / "parts", progress=Watcher(question), **settings)
    assert part.stopped_by == "cancelled" and part.steps < expected.steps
    rest = second.train(tmp_path / "parts", resume=True, **settings)
    assert (rest.steps, rest.stopped_by, rest.best_step) == (expected.steps, expected.stopped_by, expected.best_step)
    assert rest.losses == expected.losses and rest.evaluations == expected.evaluations
    assert rest.criterion == expected.criterion
    assert torch.equal(whole.gain, second.gain)
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_stopped_run_is_finished(tmp_path):
    steps = Denoiser(RULE).train(steps=400).steps
    first, again = Denoiser(RULE), Denoiser(RULE)
    first.train(tmp_path, checkpoint_every=steps)
    assert newest_states(tmp_path)[0].name == f"state-{steps:08d}.safetensors"
    result = again.train(tmp_path, resume=True)
    assert (result.stopped_by, result.steps, again.evaluated) == ("rule", steps, 0)
    assert torch.equal(first.gain, again.gain) and "DVAR: over the last" in result.summary


def test_the_best_weights_are_those_of_the_lowest_evaluation():
    seen = {}

    class Remembering(Denoiser):
        def loss(self, batch):
            seen[len(seen)] = self.gain.detach().clone()
            return super().loss(batch)

    denoiser = Remembering(DVAR(window=60, eps=0.05, every=1))
    result = denoiser.train(keep="best", learning_rate=0.1)
    losses = [loss for _, loss in result.evaluations]
    best = 1 + losses[1:].index(min(losses[1:]))
    assert 1 <= best < result.steps and result.best_step == best
    assert torch.equal(denoiser.gain, seen[best])
    assert f"best weights from step {best}" in result.summary


def test_untrained_weights_are_nobodys_best():
    class Worse(Denoiser):
        def loss(self, batch):
            super().loss(batch)
            return self.gain.abs().sum()  # lowest at the start, where the gain is 0

    denoiser = Worse(DVAR(window=10, eps=0.1, every=5))
    assert denoiser.train(keep="best", steps=8).best_step == 5


def test_a_window_longer_than_the_run_is_said_before_and_after():
    progress = Watcher()
    result = Denoiser(DVAR(window=440, eps=0.4)).train(steps=30, progress=progress)
    message = "its window of 440 steps is not shorter than the budget of 30; lower the window or allow more steps"
    assert message in progress.messages[0] and message in result.summary
    assert result.stopped_by == "steps"


def test_a_rule_that_was_not_met_says_how_far_it_came():
    result = Denoiser(DVAR(window=10, eps=1e-9, every=1)).train(steps=40)
    assert "all steps done; DVAR was not met: 0." in result.summary and "not less than 1e-09" in result.summary


def test_a_run_that_learns_nothing_is_told_so():
    class Idle(Denoiser):
        def loss(self, batch):
            return torch.tensor(0.25)

    result = Idle(DVAR(window=20, eps=0.1, every=2)).train()
    assert (result.stopped_by, result.steps) == ("rule", 19)
    assert "in 20 steps the evaluation loss did not change at all; does the training learn?" in result.summary


def test_an_evaluation_that_is_no_number_is_left_out(tmp_path):
    class Broken(Denoiser):
        def loss(self, batch):
            return super().loss(batch) * (math.nan if self.evaluated == 3 else 1)

    result = Broken(RULE).train(tmp_path, steps=9, keep="best", checkpoint_every=9)
    assert [steps for steps, _ in result.evaluations] == [0, 2, 6, 8]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_the_intervals_are_logged_and_decide_nothing(tmp_path):
    rule = DVAR(window=60, eps=0.05, every=2, evaluation=EvaluationSettings(intervals=True))
    result, plain = Denoiser(rule).train(tmp_path), Denoiser(RULE).train()
    assert result.evaluations == plain.evaluations
    names = {"step", "loss", "lr", "evaluation", "evaluation_begin", "evaluation_middle", "evaluation_end", "dvar"}
    assert logged(tmp_path)[0].keys() == names


def test_a_recipe_that_cannot_evaluate_says_so():
    weight = torch.nn.Parameter(torch.ones(()))
    groups = [ParameterGroup("g", {"w": weight}, 1e-3, 0.0)]
    with pytest.raises(TrainingError, match="needs evaluations, which this training does not make; use Stop: Fixed"):
        train_loop(TrainConfig(steps=2), groups, weight.square, device=CPU, stopping=RULE)
    assert weight.item() == 1


def test_states_of_runs_without_evaluations_still_resume(tmp_path):
    whole, first, second = Denoiser(), Denoiser(), Denoiser()
    whole.train(steps=8)
    first.train(tmp_path, steps=4, checkpoint_every=4)
    second.train(tmp_path, steps=8, resume=True)
    assert torch.equal(whole.gain, second.gain)


# Cost


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 32])
@pytest.mark.parametrize("evaluated", [1, 4, 8])
def test_the_default_frequency_keeps_evaluations_to_a_quarter_of_the_step_time(rows, evaluated):
    rule = DVAR(evaluation=EvaluationSettings(batch_size=evaluated))
    assert evaluated / (rule.frequency(rows) * rows * STEP_COST) <= EVALUATION_SHARE
    assert rule.frequency(rows) == 1 or evaluated / ((rule.frequency(rows) - 1) * rows * STEP_COST) > EVALUATION_SHARE


def recorded_curves():
    """Name, losses, window and eps of each loss series recorded from the authors' code."""
    for name in ("var_early_stopper", "early_stop_loop"):
        with safe_open(RECORDED / f"{name}.safetensors", "pt") as file:
            config = json.loads(file.metadata()["case"])["config"]
            for series, setting in (config.get("series") or {"eval_losses": config}).items():
                yield pytest.param(file.get_tensor(f"in.{series}"), setting["window"], setting["eps"], id=series)


def stopping_step(rule, curve, *, rows):
    """Step at which the rule stops a run whose objective follows the curve; its length if it does not."""
    state = rule.start(rows)
    for steps, loss in enumerate(curve):
        if state.wants_evaluation(steps):
            state.evaluated(steps, loss)
        if state.stopped:
            return steps + 1
    return len(curve)


@pytest.mark.parametrize("stretch", [10, 30])
@pytest.mark.parametrize(("losses", "window", "eps"), list(recorded_curves()))
def test_the_default_frequency_decides_within_one_window_of_every_step(losses, window, eps, stretch):
    # Drawn out to the length of real runs, with the window in proportion.
    steps, window = stretch * (len(losses) - 1) + 1, stretch * window
    curve = torch.nn.functional.interpolate(losses[None, None], size=steps, mode="linear", align_corners=True)
    curve = curve.flatten().tolist()
    expected = stopping_step(DVAR(window=window, eps=eps, every=1), curve, rows=1)
    for rows in (1, 2):
        rule = DVAR(window=window, eps=eps)
        assert rule.frequency(rows) > 1
        assert abs(stopping_step(rule, curve, rows=rows) - expected) <= 2 * rule.frequency(rows) < window


def measured_curves():
    """Preset, and losses of a training on the small world, drawn out again to the length of the authors' trainings."""
    with safe_open(MEASURED, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            losses = file.get_tensor(name)
            steps = SHORTER * (len(losses) - 1) + 1
            curve = torch.nn.functional.interpolate(losses[None, None], size=steps, mode="linear", align_corners=True)
            yield pytest.param(name.split(", ")[0], curve.flatten().tolist(), id=name)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("preset", "curve"), list(measured_curves()))
def test_on_measured_losses_a_quarter_of_the_passes_decides_within_one_window(preset, curve, rows):
    window, eps = PRESETS[preset].window, PRESETS[preset].eps
    expected = stopping_step(DVAR(window=window, eps=eps, every=1), curve, rows=rows)
    rule = DVAR(window=window, eps=eps)
    found = stopping_step(rule, curve, rows=rows)
    assert abs(found - expected) <= window
    state, each = rule.start(rows), rule.evaluation.rows
    passes = sum(each for steps in range(found) if steps and state.wants_evaluation(steps))
    assert 0 < passes / (found * rows * STEP_COST) <= EVALUATION_SHARE


def test_measured_losses_are_of_all_three_presets_and_some_are_stopped():
    curves = [parameter.values for parameter in measured_curves()]
    assert {preset for preset, _ in curves} == PRESETS.keys()
    for preset in PRESETS:
        rule = DVAR(window=PRESETS[preset].window, eps=PRESETS[preset].eps)
        ends = [(stopping_step(rule, curve, rows=4), len(curve)) for name, curve in curves if name == preset]
        assert any(end < length for end, length in ends), preset


def test_a_window_keeps_enough_evaluations_and_a_given_frequency_is_kept():
    large = EvaluationSettings(batch_size=64)
    assert DVAR(window=180, evaluation=large).frequency(1) == 18
    assert DVAR(window=5, evaluation=large).frequency(1) == 1
    assert DVAR(window=180, every=45, evaluation=large).frequency(1) == 45


def test_settings_that_cannot_work_are_refused():
    for settings, message in (
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": -1.0}, "eps must be above 0"),
        ({"window": 1}, "window must be at least 2"),
        ({"every": -1}, "DVAR's every must be 0 or more"),
        ({"max_steps": -1}, "DVAR's max_steps must be 0 or more"),
        ({"window": 10, "every": 6}, "holds fewer than 2 evaluations, one every 6 steps; make it longer"),
    ):
        with pytest.raises(ConfigError, match=message):
            DVAR(**settings)


def test_what_decides_the_course_is_in_the_identity():
    base = DVAR().identity()
    others = [DVAR(window=100), DVAR(eps=0.1), DVAR(every=3), DVAR(evaluation=EvaluationSettings(code="11110"))]
    assert len({base, *(rule.identity() for rule in others), FixedSteps().identity()}) == 6
    assert DVAR(max_steps=7).identity() == base and (DVAR(max_steps=7).limit(9), DVAR().limit(9)) == (7, 9)
