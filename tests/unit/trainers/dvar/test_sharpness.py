"""Sharpness-aware minimization in a training: two gradients of one batch per step, exact resume, DVAR."""

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.dvar import EvaluationSettings
from comfyui_personalize.models.dvar.sharpness import worst_point
from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.dvar import textual_inversion
from comfyui_personalize.trainers.dvar.config import TextualInversionConfig
from comfyui_personalize.trainers.optimizer import check_optimizer
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.stopping import DVAR


@pytest.fixture
def train(tiny):
    settings = {"optimizer": "sam", "learning_rate": 1e-2, "gradient_accumulation": 2}
    return lambda **more: tiny.train(textual_inversion, TextualInversionConfig, **settings | more)


def word(result):
    return load_file(result.files[0])["clip_l"]


class CancelAtQuestion(SilentProgress):
    """The user cancels in the pass at the worst point of a step: the loop asks before each of its four passes."""

    def __init__(self):
        self.steps, self.questions = 0, 0

    def report(self, step, total, message="", preview=None):
        self.steps = step if message.startswith("loss") else self.steps

    def cancelled(self):
        self.questions += self.steps == 2
        return self.questions >= 4


def test_the_worst_point_is_left_as_it_was_found():
    weights = [torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.tensor([1.0]))]
    weights[0].grad = torch.tensor([0.6, 0.8])
    with pytest.raises(RuntimeError), worst_point(weights, 0.5):
        # ‖g‖ = 1, so that the step is half of it.
        torch.testing.assert_close(weights[0].detach(), torch.tensor([3.3, 4.4]))
        assert weights[1].item() == 1
        raise RuntimeError
    assert weights[0].tolist() == [3, 4]


def test_each_batch_is_seen_twice(train, monkeypatch):
    batches, following = [], LatentBatches.next
    monkeypatch.setattr(LatentBatches, "next", lambda self: batches.append(following(self)) or batches[-1])
    losses = train(steps=2).train.losses
    assert len(losses) == 2 and len(batches) == 8
    for first, again in [(0, 2), (1, 3), (4, 6), (5, 7)]:
        assert torch.equal(batches[first].noise, batches[again].noise)
    assert not torch.equal(batches[0].noise, batches[1].noise) and not torch.equal(batches[0].noise, batches[4].noise)


@pytest.mark.parametrize("optimizer", ["sam", "adaptive_sam"])
def test_cancel_at_the_worst_point_and_resume_equal_one_run(optimizer, train):
    whole = train(name="whole", optimizer=optimizer, sam_rho=0.5, steps=4)
    part = train(name="parts", optimizer=optimizer, sam_rho=0.5, steps=4, progress=CancelAtQuestion())
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = train(name="parts", optimizer=optimizer, sam_rho=0.5, steps=4, resume=True)
    assert rest.train.losses == whole.train.losses and torch.equal(word(rest), word(whole))
    plain = train(name="plain", optimizer=optimizer, sam_rho=0.0, steps=4)
    assert not torch.equal(word(plain), word(whole))


def test_dvar_stops_it(train):
    rule = DVAR(window=3, eps=1.0, every=1, evaluation=EvaluationSettings(batch_size=3))
    result = train(steps=40, stopping=rule).train
    assert result.stopped_by == "rule" and 4 <= result.steps < 40


def test_a_loss_scale_that_adapts_is_refused(train):
    with pytest.raises(ConfigError, match="optimizer 'sam' cannot train in fp16; set precision to bf16 or fp32"):
        check_optimizer(TextualInversionConfig(optimizer="sam", precision="fp16"))
    with pytest.raises(ConfigError, match="sam_rho must be 0 or more"):
        train(sam_rho=-1.0)
