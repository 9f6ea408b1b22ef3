"""Train DCO with Stop: DVAR in this process: it stops early, resumes exactly, and refuses what cannot work."""

import json

import pytest
import torch
from safetensors.torch import load_file

SOON = {"preset": "custom", "window": 4, "eps": 1.0, "every": 1, "eval_batch_size": 2}


@pytest.fixture
def rule(comfy):
    """rule(**widgets): what Stop: DVAR gives; its own defaults where nothing is said."""
    from comfyui_personalize.nodes.stopping import StopDVAR

    defaults = {socket.id: socket.default for socket in StopDVAR.define_schema().inputs}
    return lambda **widgets: StopDVAR.execute(**defaults | widgets).result[0]


@pytest.fixture
def train(comfy, tiny_checkpoint, load_helper):
    """train(name, stopping, **settings): run Train DCO on one picture, as the host does it."""
    from comfyui_personalize.models.tokens import LearnedToken
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.train_dco import TrainDCO
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.dataset import Dataset

    quick = load_helper("host/training_graphs.py").QUICK | {"steps": 40}
    base = open_base(tiny_checkpoint("sd15"), tokenizer=_host.tokenizer_folder())
    tokens = (LearnedToken("<dog>", "dog"),)
    dataset = Dataset.from_tensors(_host.image_list([torch.rand(1, 40, 48, 3)]), "a <dog>", tokens=tokens)

    def run(name, stopping, **settings):
        node = TrainDCO.PREPARE_CLASS_CLONE(None)
        return node.execute(base=base, dataset=dataset, output_name=name, stopping=stopping, **quick | settings)

    return run


def saved(comfy, name):
    files = [path for folder in ("loras", "embeddings") for path in (comfy.base / "models" / folder).glob(f"{name}.*")]
    return {(path.parent.name, key): value for path in files for key, value in load_file(path).items()}


def test_it_stops_early_and_resumes_exactly(comfy, rule, train, monkeypatch):
    from comfyui_personalize.trainers.dco import train as recipe

    stopping = rule(**SOON)
    whole = train("dvar_whole", stopping)
    steps, summary = whole.result[3:]
    assert 5 <= steps < 40 and "DVAR: over the last 4 steps the evaluation loss had" in summary
    log = comfy.base / "output" / "personalize" / "dvar_whole" / "log.jsonl"
    assert sum("dvar" in json.loads(line) for line in log.read_text().splitlines()) == steps

    done, step = [], recipe.dco_step

    def cancelling(*arguments, **keywords):
        done.append(None)
        if len(done) == 3:
            comfy.model_management.interrupt_current_processing()
        return step(*arguments, **keywords)

    monkeypatch.setattr(recipe, "dco_step", cancelling)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train("dvar_parts", stopping)
    monkeypatch.setattr(recipe, "dco_step", step)
    rest = train("dvar_parts", stopping, resume=True)
    assert rest.result[3] == steps
    first, second = saved(comfy, "dvar_whole"), saved(comfy, "dvar_parts")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(whole.result[1], rest.result[1])  # the curve, evaluations included


def test_a_window_longer_than_the_run_is_said(rule, train):
    output = train("dvar_short", rule(), steps=2)
    assert output.result[3] == 2
    assert (
        "DVAR could not stop this run: its window of 440 steps is not shorter than the budget of 2" in output.result[4]
    )


def test_presets_and_own_numbers(rule):
    numbers = {
        name: rule(preset=name, window=7, eps=0.9) for name in ("textual inversion", "custom diffusion", "custom")
    }
    assert {name: (one.window, one.eps) for name, one in numbers.items()} == {
        "textual inversion": (310, 0.15),
        "custom diffusion": (180, 0.15),
        "custom": (7, 0.9),
    }
    assert (rule().window, rule().eps) == (440, 0.4)
    assert (rule(max_steps=9).limit(5), rule().limit(5)) == (9, 5)


def test_what_cannot_work_is_refused(rule):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.stopping import StopDVAR

    for widgets, message in (
        ({"preset": "custom", "eps": 0.0}, "eps must be above 0 and at most 1"),
        ({"preset": "custom", "eps": -1.0}, "eps must be above 0 and at most 1"),
        ({"preset": "custom", "window": 1}, "window must be at least 2"),
        ({"code": "111"}, "five digits"),
        ({"every": 300}, "fewer than 2 evaluations"),
    ):
        with pytest.raises(ConfigError, match=message):
            rule(**widgets)
    assert StopDVAR.validate_inputs(preset="dreambooth", code="11111") is True
    assert StopDVAR.validate_inputs() is True
    assert "no preset named 'sloth'" in StopDVAR.validate_inputs(preset="sloth")
    assert "five digits" in StopDVAR.validate_inputs(code="2")
