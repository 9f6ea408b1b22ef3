"""The training loop on toy parameters: exact arithmetic, exact resume, and every way to stop."""

import errno
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfyui_personalize.models.errors import ConfigError, FormatError, MissingDependencyError, TrainingError
from comfyui_personalize.trainers import loop
from comfyui_personalize.trainers.best import SMOOTHING_STEPS
from comfyui_personalize.trainers.checkpoint import GeneratorState, check_resumable, newest_states
from comfyui_personalize.trainers.config import TrainConfig
from comfyui_personalize.trainers.devices import autocast, dtype_of, resolve
from comfyui_personalize.trainers.loop import ParameterGroup, clip_gradients, train_loop
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.stopping import FixedSteps

CPU = torch.device("cpu")


class Toy:
    """A linear regression in two parameter groups; every row of a batch is drawn from the generator by itself."""

    def __init__(self, rows=1):
        self.rows = rows
        self.calls = 0
        self.generator = torch.Generator().manual_seed(7)
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.groups = [
            ParameterGroup("weight", {"w": self.weight}, 1e-2, 0.1),
            ParameterGroup("bias", {"w": self.bias}, 1e-3, 0.0),
        ]
        self.state = {"generator": GeneratorState(self.generator)}

    def step(self):
        self.calls += 1
        rows = torch.stack([torch.randn(7, generator=self.generator) for _ in range(self.rows)])
        return (rows[:, :4] @ self.weight + self.bias - rows[:, 4:]).square().mean()

    def train(self, folder=None, *, step=None, **arguments):
        loop_arguments = {"progress", "stopping", "clip_also", "after_step", "preview", "fingerprint", "ranks", "save"}
        settings = {name: value for name, value in arguments.items() if name not in loop_arguments}
        return train_loop(
            TrainConfig(precision="fp32", **settings),
            self.groups,
            step or self.step,
            device=CPU,
            state=self.state,
            run_folder=folder,
            **{name: arguments[name] for name in arguments.keys() & loop_arguments},
        )

    @property
    def weights(self):
        return [self.weight.detach().clone(), self.bias.detach().clone()]


class CancelAfter(SilentProgress):
    """The user cancels when the loop has asked so many times."""

    def __init__(self, questions):
        self.questions = questions
        self.reports = []

    def report(self, step, total, message="", preview=None):
        self.reports.append((step, total, message, preview))

    def cancelled(self):
        self.questions -= 1
        return self.questions < 0


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def sgd(monkeypatch, rate=1.0):
    """Plain gradient descent in place of AdamW: a parameter's change shows its gradient."""

    def make(config, groups, ranks):
        return torch.optim.SGD([{"params": list(group.parameters.values())} for group in groups], lr=rate)

    monkeypatch.setattr(loop, "make_optimizer", make)


# Arithmetic


def test_accumulation_equals_a_bigger_batch():
    big, small = Toy(rows=4), Toy(rows=1)
    losses = big.train(steps=5).losses
    assert small.train(steps=5, gradient_accumulation=4).losses == pytest.approx(losses, rel=1e-6)
    assert small.calls == 4 * big.calls
    for a, b in zip(big.weights, small.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_loop_is_adamw_with_a_group_rate_and_decay():
    ours, plain = Toy(), Toy()
    ours.train(steps=4, max_grad_norm=0.5, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = torch.optim.AdamW(
        [{"params": [plain.weight], "lr": 1e-2, "weight_decay": 0.1}, {"params": [plain.bias], "lr": 1e-3}],
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=0.0,
    )
    for _ in range(4):
        optimizer.zero_grad()
        plain.step().backward()
        torch.nn.utils.clip_grad_norm_([plain.weight, plain.bias], 0.5)
        optimizer.step()
    assert same(ours.weights, plain.weights)


def test_clipping_covers_gradients_that_nobody_steps(monkeypatch):
    # The gradients are 3 and 4, their common norm 5; clipped to 1 the trained one becomes 3/5.
    sgd(monkeypatch)
    trained, other = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    settings = {"groups": [ParameterGroup("g", {"p": trained}, 1.0, 0.0)], "device": CPU, "clip_also": [other]}
    train_loop(TrainConfig(steps=1), step=lambda: 3 * trained + 4 * other, **settings)
    assert trained.item() == pytest.approx(-0.6, abs=1e-6)
    assert other.item() == 0 and other.grad is None
    # Gradients of the second step must not pile up on those of the first.
    train_loop(TrainConfig(steps=2), step=lambda: 3 * trained + 4 * other, **settings)
    assert trained.item() == pytest.approx(-1.8, abs=1e-6)


def test_a_norm_of_zero_turns_clipping_off():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter, torch.zeros(1)], 0.0) == 5
    assert parameter.grad.tolist() == [3, 4]
    assert clip_gradients([parameter], 10.0) == 5
    assert parameter.grad.tolist() == [3, 4]


def test_the_learning_rate_scales_with_everything_that_makes_a_batch(tmp_path):
    Toy().train(tmp_path, steps=1, scale_learning_rate=True, batch_size=3, gradient_accumulation=2)
    assert logged(tmp_path)[0]["lr"] == pytest.approx(6e-2)


def test_after_step_runs_once_a_step_on_new_weights():
    toy, seen = Toy(), []
    toy.train(steps=3, gradient_accumulation=2, after_step=lambda: seen.append(toy.weights))
    assert len(seen) == 3 and same(seen[-1], toy.weights) and not same(seen[0], seen[1])


# Schedules


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def formula(name, step, *, warmup, total):
    """Fraction of the peak rate at which step number ``step``, counted from 0, is taken."""
    if name != "constant" and step < warmup:
        return step / warmup
    done = (step - warmup) / (total - warmup)
    return {
        "constant": 1.0,
        "constant_with_warmup": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "cosine_with_restarts": 0.5 * (1 + math.cos(math.pi * (2 * done % 1))),
        # It ends at 1e-7 of a peak of 1e-3, AdamW's own default.
        "polynomial": (1 - 1e-4) * (1 - done) ** 2 + 1e-4,
    }[name]


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_schedules_follow_their_formulas(name, tmp_path):
    Toy().train(tmp_path, steps=10, lr_schedule=name, warmup_steps=3, lr_cycles=2, lr_power=2.0)
    expected = [1e-2 * formula(name, step, warmup=3, total=10) for step in range(10)]
    assert [line["lr"] for line in logged(tmp_path)] == pytest.approx(expected, abs=1e-9)


def test_the_rate_that_is_logged_is_the_one_that_was_used():
    toy = Toy()
    before = toy.weights
    toy.train(steps=1, lr_schedule="linear", warmup_steps=4)
    assert same(toy.weights, before)  # the first step of a warm-up has the rate 0


# Not a number


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_first_loss_that_is_no_number_is_an_error(value):
    toy = Toy()
    before = toy.weights
    with pytest.raises(TrainingError, match="the first loss is not a number; use fp32 or bf16"):
        toy.train(steps=3, step=lambda: toy.step() * value)
    assert same(toy.weights, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_later_loss_that_is_no_number_keeps_the_last_good_weights(value):
    good, bad = Toy(), Toy()
    good.train(steps=4)
    result = bad.train(steps=9, step=lambda: bad.step() * (value if bad.calls == 5 else 1))
    assert (result.stopped_by, result.steps, len(result.losses)) == ("nan", 4, 4)
    assert same(good.weights, bad.weights)
    assert "4 steps (the loss was no longer a number; the last good weights were kept)" in result.summary


def test_a_gradient_that_is_no_number_is_noticed_under_a_good_loss():
    good, bad = Toy(), Toy()
    good.train(steps=2)

    def step():
        loss = bad.step()
        # The root's slope at 0 is infinite, and infinity times 0 is no number.
        return loss + (bad.weight * 0).square().sum().sqrt() if bad.calls == 3 else loss

    result = bad.train(steps=5, step=step)
    assert (result.stopped_by, result.steps) == ("nan", 2)
    assert same(good.weights, bad.weights)


# Best weights


class Scripted:
    """Losses as written down, and a weight that tells how many steps it has taken."""

    def __init__(self, losses):
        self.losses = losses
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.place = 0
        self.groups = [ParameterGroup("g", {"w": self.weight}, 1.0, 0.0)]

    def step(self):
        # The forward value is the scripted loss and the slope is -1: the weight counts the steps.
        loss = self.losses[self.place] - (self.weight - self.weight.detach())
        self.place += 1
        return loss

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]

    def train(self, folder=None, steps=None, save=None, **settings):
        config = TrainConfig(steps=steps or len(self.losses), max_grad_norm=0.0, **settings)
        state = {"script": self}
        return train_loop(config, self.groups, self.step, device=CPU, state=state, run_folder=folder, save=save)


VALLEY = [abs(step - 40.3) / 40 + 0.3 * (step % 2) for step in range(60)]


def test_the_best_weights_are_those_of_the_lowest_smoothed_loss(monkeypatch):
    sgd(monkeypatch)
    script = Scripted(VALLEY)
    result = script.train(keep="best")
    means = {end: sum(VALLEY[end - SMOOTHING_STEPS : end]) for end in range(SMOOTHING_STEPS, 61)}
    best = min(means, key=means.get)
    assert 40 < best < 60
    assert (result.best_step, script.weight.item()) == (best, best)
    assert f"best weights from step {best}" in result.summary


def test_the_last_weights_are_kept_otherwise(monkeypatch):
    sgd(monkeypatch)
    script = Scripted(VALLEY)
    assert script.train(keep="last").best_step is None
    assert script.weight.item() == 60


def test_a_run_too_short_for_a_mean_keeps_its_last_weights(monkeypatch):
    sgd(monkeypatch)
    script = Scripted(VALLEY[: SMOOTHING_STEPS - 1])
    assert script.train(keep="best").best_step is None
    assert script.weight.item() == SMOOTHING_STEPS - 1


def test_the_best_weights_survive_a_resume(monkeypatch, tmp_path):
    sgd(monkeypatch)
    whole = Scripted(VALLEY)
    expected = whole.train(keep="best").best_step
    Scripted(VALLEY).train(tmp_path, steps=expected + 2, keep="best", checkpoint_every=expected + 2)
    resumed = Scripted(VALLEY)
    assert resumed.train(tmp_path, keep="best", resume=True).best_step == expected
    assert torch.equal(resumed.weight, whole.weight)


def test_the_best_weights_may_be_asked_for_when_a_run_is_resumed(monkeypatch, tmp_path):
    sgd(monkeypatch)
    Scripted(VALLEY).train(tmp_path, steps=30, keep="last", checkpoint_every=30)
    resumed = Scripted(VALLEY)
    result = resumed.train(tmp_path, keep="best", resume=True)
    assert result.best_step > 40 and resumed.weight.item() == result.best_step


# Checkpoints and resume


RESUME = {"steps": 12, "gradient_accumulation": 2, "lr_schedule": "cosine", "warmup_steps": 2, "checkpoint_every": 6}


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole, first, second = Toy(), Toy(), Toy()
    expected = whole.train(tmp_path / "whole", **RESUME)
    interrupted = first.train(tmp_path / "parts", **RESUME, progress=CancelAfter(2 * 6))
    assert (interrupted.stopped_by, interrupted.steps) == ("cancelled", 6)
    result = second.train(tmp_path / "parts", **RESUME, resume=True)
    assert same(whole.weights, second.weights)
    assert (result.losses, result.steps) == (expected.losses, 12)
    assert second.calls == whole.calls - first.calls
    log = (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == log and log.count(b"\n") == 12
    # The optimizer's moments, the schedule and the generator are in the last state of both runs.
    states = [load_file(newest_states(tmp_path / name)[0]) for name in ("whole", "parts")]
    assert {name.split(".")[-1] for name in states[0]} >= {"exp_avg", "exp_avg_sq", "step", "generator", "w"}
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_crash_after_the_last_state_repeats_the_steps_since(tmp_path):
    whole, crashed, second = Toy(), Toy(), Toy()
    whole.train(tmp_path / "whole", **RESUME)

    def step():
        if crashed.calls == 2 * 9 + 1:
            raise RuntimeError("power cut")
        return crashed.step()

    with pytest.raises(RuntimeError, match="power cut"):
        crashed.train(tmp_path / "parts", step=step, **RESUME)
    log = tmp_path / "parts" / "log.jsonl"
    assert len(logged(tmp_path / "parts")) == 9
    log.write_text(log.read_text() + '{"step": 10, "lo')
    second.train(tmp_path / "parts", **RESUME, resume=True)
    assert same(whole.weights, second.weights)
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_finished_run_resumes_into_a_longer_one(tmp_path):
    whole, first, second, third = Toy(), Toy(), Toy(), Toy()
    whole.train(steps=8)
    first.train(tmp_path, steps=5, checkpoint_every=5)
    again = third.train(tmp_path, steps=5, checkpoint_every=5, resume=True)
    assert (again.steps, third.calls, again.stopped_by) == (5, 0, "steps") and same(third.weights, first.weights)
    assert second.train(tmp_path, steps=8, resume=True).steps == 8
    assert same(whole.weights, second.weights)


def test_resume_without_a_state_starts_anew(tmp_path):
    fresh, toy = Toy(), Toy()
    fresh.train(steps=2)
    assert toy.train(tmp_path / "new", steps=2, resume=True).steps == 2
    assert same(fresh.weights, toy.weights)


def test_only_the_newest_states_are_kept(tmp_path):
    Toy().train(tmp_path, steps=9, checkpoint_every=2, checkpoint_limit=3)
    assert [path.name for path in newest_states(tmp_path)] == [f"state-{step:08d}.safetensors" for step in (8, 6, 4)]


def test_a_new_run_clears_the_states_of_the_old_one(tmp_path):
    Toy().train(tmp_path, steps=4, checkpoint_every=2)
    Toy().train(tmp_path, steps=1)
    assert newest_states(tmp_path) == []
    assert len(logged(tmp_path)) == 1


def test_resume_with_other_settings_is_refused_in_one_sentence(tmp_path):
    Toy().train(tmp_path, steps=2, checkpoint_every=2, fingerprint="a")
    toy = Toy()
    before, files = toy.weights, snapshot(tmp_path)
    message = "state-00000002.safetensors was made with other settings, pictures, base model or stopping rule; restore"
    with pytest.raises(ConfigError, match=message):
        toy.train(tmp_path, steps=4, resume=True, fingerprint="b")
    assert same(before, toy.weights) and snapshot(tmp_path) == files
    with pytest.raises(ConfigError, match=message):
        check_resumable(tmp_path, "b")
    assert check_resumable(tmp_path, "a") and not check_resumable(tmp_path / "none", "a")


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_state_is_named(keep, tmp_path):
    Toy().train(tmp_path, steps=4, checkpoint_every=2)
    newest, older = newest_states(tmp_path)
    newest.write_bytes(newest.read_bytes()[:keep])
    with pytest.raises(FormatError, match=f"training state {newest.name} is damaged .*delete it"):
        Toy().train(tmp_path, steps=6, resume=True)
    newest.unlink()
    whole, resumed = Toy(), Toy()
    whole.train(steps=6)
    resumed.train(tmp_path, steps=6, resume=True)
    assert same(whole.weights, resumed.weights)


def test_a_file_of_another_kind_is_not_taken_for_a_state(tmp_path):
    from comfyui_personalize.models.formats import write_safetensors

    write_safetensors(tmp_path / "state-00000005.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(FormatError, match="expected a training-state/1 file"):
        Toy().train(tmp_path, steps=6, resume=True)


def test_a_full_disk_leaves_the_older_state_intact(tmp_path, monkeypatch):
    from comfyui_personalize.models import formats

    save = formats.save_file

    def full(tensors, path, metadata=None):
        if json.loads(metadata["values"])["step"] > 2:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(tensors, path, metadata=metadata)

    monkeypatch.setattr(formats, "save_file", full)
    with pytest.raises(FormatError, match="state-00000004.safetensors could not be saved .*No space left.*free space"):
        Toy().train(tmp_path, steps=6, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state-00000002.safetensors"]
    monkeypatch.setattr(formats, "save_file", save)
    whole, resumed = Toy(), Toy()
    whole.train(steps=6)
    resumed.train(tmp_path, steps=6, resume=True)
    assert same(whole.weights, resumed.weights)


def test_a_log_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FormatError, match="log.jsonl could not be written in .*taken.*choose a writable folder"):
        Toy().train(tmp_path / "taken", steps=1)


# Cancelling


def test_cancel_is_heard_before_the_next_forward_pass(tmp_path):
    toy = Toy()
    progress = CancelAfter(3)
    result = toy.train(tmp_path, steps=9, progress=progress)
    assert (result.stopped_by, result.steps, toy.calls) == ("cancelled", 3, 3)
    assert [step for step, *_ in progress.reports] == [0, 1, 2, 3]
    assert [path.name for path in newest_states(tmp_path)] == ["state-00000003.safetensors"]
    assert "3 steps (cancelled)" in result.summary


def test_cancel_before_the_first_step_leaves_no_state(tmp_path):
    toy = Toy()
    before = toy.weights
    result = toy.train(tmp_path, steps=9, progress=CancelAfter(0))
    assert (result.stopped_by, result.steps) == ("cancelled", 0)
    assert same(before, toy.weights) and newest_states(tmp_path) == []


@pytest.mark.parametrize("questions", [4, 5, 6, 7])
def test_cancel_in_the_middle_of_accumulation_resumes_exactly(questions, tmp_path):
    settings = {"steps": 5, "gradient_accumulation": 3}
    whole, first, second = Toy(), Toy(), Toy()
    expected = whole.train(**settings)
    result = first.train(tmp_path, **settings, progress=CancelAfter(questions))
    assert (result.steps, first.calls) == (questions // 3, questions)
    assert first.weight.grad is None
    resumed = second.train(tmp_path, **settings, resume=True)
    assert resumed.losses == expected.losses
    assert same(whole.weights, second.weights)


# What a run leaves


class Saved:
    """Takes what was learned, or refuses as a full disk does."""

    def __init__(self, toy, *, full=False):
        self.toy, self.full, self.weights = toy, full, []

    def __call__(self, result):
        if self.full:
            raise FormatError("my_dog.safetensors could not be saved")
        self.weights.append(self.toy.weights)


@pytest.mark.parametrize("questions", [0, 3, 99])
def test_what_was_learned_is_saved_once_at_any_end(questions):
    toy = Toy()
    saved = Saved(toy)
    result = toy.train(steps=5, save=saved, progress=CancelAfter(questions))
    assert result.steps == min(questions, 5)
    assert len(saved.weights) == (1 if questions else 0)
    assert all(same(weights, toy.weights) for weights in saved.weights)


def test_a_failure_saves_what_was_learned_and_resumes_exactly(tmp_path):
    whole, toy, second = Toy(), Toy(), Toy()
    expected = whole.train(steps=6, gradient_accumulation=2)
    saved = Saved(toy)

    def step():
        if toy.calls == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return toy.step()

    message = r"out of memory at step 3 .* \(what was learned in 2 steps was saved\)$"
    with pytest.raises(TrainingError, match=message):
        toy.train(tmp_path, steps=6, gradient_accumulation=2, step=step, save=saved)
    assert len(saved.weights) == 1
    result = second.train(tmp_path, steps=6, gradient_accumulation=2, resume=True)
    assert result.losses == expected.losses and same(whole.weights, second.weights)


def test_a_result_that_cannot_be_saved_leaves_the_state(tmp_path):
    toy, second = Toy(), Toy()
    message = "my_dog.safetensors could not be saved; the training state was kept, resume continues from step 3"
    with pytest.raises(FormatError, match=message):
        toy.train(tmp_path, steps=3, save=Saved(toy, full=True))
    saved = Saved(second)
    assert second.train(tmp_path, steps=3, save=saved, resume=True).steps == 3
    assert second.calls == 0 and same(saved.weights[0], toy.weights)


def test_that_state_holds_the_last_weights_and_not_the_best(monkeypatch, tmp_path):
    sgd(monkeypatch)
    script = Scripted(VALLEY)
    with pytest.raises(FormatError, match="training state was kept"):
        script.train(tmp_path, keep="best", save=Saved(script, full=True))
    assert script.weight.item() == 60
    resumed, whole = Scripted([*VALLEY, 0.0, 0.0]), Scripted([*VALLEY, 0.0, 0.0])
    taken = []
    result = resumed.train(tmp_path, keep="best", resume=True, save=lambda _: taken.append(resumed.weight.item()))
    assert (result.best_step, taken) == (whole.train(keep="best").best_step, [whole.weight.item()])


def test_older_states_outlive_a_run_that_takes_no_step(tmp_path):
    Toy().train(tmp_path, steps=2, checkpoint_every=2)
    before = newest_states(tmp_path)
    Toy().train(tmp_path, steps=2, progress=CancelAfter(0))
    assert newest_states(tmp_path) == before != []


def test_too_little_memory_for_a_preview_only_ends_the_previews(tmp_path):
    asked, progress, plain, toy = [], CancelAfter(99), Toy(), Toy()

    def preview(step):
        asked.append(step)
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain.train(steps=6)
    result = toy.train(tmp_path, steps=6, preview_every=2, preview=preview, progress=progress)
    assert (result.stopped_by, result.steps, asked) == ("steps", 6, [2])
    assert "no more previews: not enough memory" in progress.reports[-1][2]
    assert same(plain.weights, toy.weights)


def test_processes_that_resume_from_different_steps_are_stopped(tmp_path):
    class Other(Ranks):
        count = 2

        def mean(self, tensor):
            return tensor / 2  # the other process found no state and starts at 0

    Toy().train(tmp_path, steps=2, checkpoint_every=2)
    with pytest.raises(TrainingError, match="resume from different steps.*on a shared disk"):
        Toy().train(tmp_path, steps=4, resume=True, ranks=Other())


# Stopping rules


class LossBudget:
    """A rule that stops when the losses so far exceed a budget."""

    evaluation = pictures = None

    def __init__(self, budget):
        self.budget = budget

    def limit(self, steps):
        return steps

    def start(self, rows):
        return _Spent(self.budget)

    def identity(self):
        return f"budget {self.budget}"


class _Spent:
    at_once = False
    measure = label = ""
    threshold = None

    def __init__(self, budget):
        self.budget, self.spent, self.steps = budget, 0.0, []

    @property
    def stopped(self):
        return self.spent > self.budget

    def wants_evaluation(self, steps):
        return False

    def explain(self, total):
        return f"{self.spent:.1f} of {self.budget:.1f} spent"

    def should_stop(self, step, loss):
        self.spent += loss
        self.steps.append(step)
        return self.stopped

    def state_dict(self):
        return {"spent": self.spent, "steps": self.steps}

    def load_state_dict(self, state):
        self.spent, self.steps = state["spent"], list(state["steps"])


def test_a_rule_stops_the_loop_and_its_step_is_still_taken():
    plain, ruled = Toy(), Toy()
    losses = plain.train(steps=5).losses
    result = ruled.train(steps=50, stopping=LossBudget(sum(losses) - 1e-6))
    assert (result.stopped_by, result.steps, result.losses) == ("rule", 5, losses)
    assert same(plain.weights, ruled.weights)


def test_a_rule_resumes_with_its_state(tmp_path):
    losses = Toy().train(steps=7).losses
    rule = LossBudget(sum(losses) - 1e-6)
    assert Toy().train(tmp_path, steps=50, stopping=rule, progress=CancelAfter(3)).steps == 3
    result = Toy().train(tmp_path, steps=50, stopping=rule, resume=True)
    assert (result.stopped_by, result.steps) == ("rule", 7)
    assert "7 steps (" in result.summary and "spent)" in result.summary


def test_a_run_that_a_rule_stopped_takes_no_further_step(tmp_path):
    rule = LossBudget(sum(Toy().train(steps=6).losses) - 1e-6)
    first, again = Toy(), Toy()
    assert first.train(tmp_path, steps=50, stopping=rule, checkpoint_every=6).steps == 6
    saved = Saved(again)
    result = again.train(tmp_path, steps=50, stopping=rule, checkpoint_every=6, resume=True, save=saved)
    assert (result.stopped_by, result.steps, again.calls) == ("rule", 6, 0)
    assert same(saved.weights[0], first.weights)


def test_fixed_steps_replace_the_configured_number():
    assert Toy().train(steps=50, stopping=FixedSteps(3)).steps == 3
    assert Toy().train(steps=4, stopping=FixedSteps()).steps == 4
    with pytest.raises(ConfigError, match="steps must be 0 or more"):
        FixedSteps(-1)


# Previews


def test_previews_come_every_so_many_steps_and_are_saved(tmp_path):
    progress, asked = CancelAfter(99), []

    def preview(step):
        asked.append(step)
        return Image.new("RGB", (8, 8), (step, 0, 0))

    Toy().train(tmp_path, steps=7, preview_every=3, preview=preview, progress=progress)
    assert asked == [3, 6]
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["preview-000003.jpg", "preview-000006.jpg"]
    assert [step for step, _, _, picture in progress.reports if picture is not None] == [3, 6]


def test_a_preview_that_was_cancelled_is_left_out(tmp_path):
    result = Toy().train(tmp_path, steps=9, preview_every=2, preview=lambda step: None, progress=CancelAfter(2))
    assert (result.stopped_by, result.steps) == ("cancelled", 2)
    assert list(tmp_path.glob("*.jpg")) == []


# What the machine lacks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_out_of_memory_says_what_to_lower(checkpointing):
    toy = Toy()

    def step():
        if toy.calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return toy.step()

    message = "out of memory at step 3 with batch size 4, fp32.*; lower the batch size, the resolution or the rank"
    with pytest.raises(TrainingError, match=message) as caught:
        toy.train(steps=5, step=step, batch_size=4, gradient_checkpointing=checkpointing)
    assert ("no gradient checkpointing" in str(caught.value)) is not checkpointing
    assert toy.weight.grad is None


def test_eight_bit_without_its_package_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingDependencyError, match="needs the package bitsandbytes.*use 'adamw'"):
        Toy().train(steps=1, optimizer="adamw8bit")


def test_eight_bit_takes_the_same_settings_and_resumes(monkeypatch, tmp_path):
    made = []

    class AdamW8bit(torch.optim.AdamW):
        """bitsandbytes' own state dictionary has the tensors one level deeper; it reads both."""

        def __init__(self, groups, **settings):
            made.append(settings)
            super().__init__(groups, **settings)

        def state_dict(self):
            whole = super().state_dict()
            return {**whole, "state": {index: {"wrapped": entries} for index, entries in whole["state"].items()}}

    plain = Toy()
    plain.train(steps=2, adam_beta1=0.5)
    package = type(loop)("bitsandbytes.optim")
    package.AdamW8bit = AdamW8bit
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", type(loop)("bitsandbytes"))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", package)
    toy = Toy()
    settings = {"adam_beta1": 0.5, "optimizer": "adamw8bit", "checkpoint_every": 1}
    toy.train(tmp_path, steps=1, **settings)
    assert made == [{"betas": (0.5, 0.999), "eps": 1e-8}]
    again = Toy()
    again.train(tmp_path, steps=2, resume=True, **settings)
    assert same(plain.weights, again.weights)


def test_fp16_is_refused_where_it_cannot_train():
    with pytest.raises(ConfigError, match="precision fp16 needs a GPU.*choose fp32 or bf16"):
        dtype_of("fp16", CPU)
    assert dtype_of("bf16", CPU) is torch.bfloat16


def test_auto_precision_is_full_on_the_cpu():
    assert resolve(TrainConfig(), CPU).precision == "fp32"
    assert resolve(TrainConfig(precision="bf16"), CPU).precision == "bf16"
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_memory_and_speed_are_measured():
    result = Toy().train(steps=3)
    assert result.steps_per_second > 0
    # A process that has imported torch takes between 50 MiB and what the machine has.
    assert 50 * 2**20 < result.peak_memory_bytes < 2**42
