"""Compare Loss Curves in this process, on logs as trainings write them."""

import json

import pytest


@pytest.fixture
def run(comfy):
    """run(name, losses, evaluations): leave a log in the host's output folder."""

    def write(name, losses, evaluations=()):
        folder = comfy.base / "output" / "personalize" / name
        folder.mkdir(parents=True, exist_ok=True)
        measured = {steps: {"evaluation": loss} for steps, loss in evaluations}
        lines = [{"step": step + 1, "loss": loss, "lr": 1e-3, **measured.get(step, {})} for step, loss in losses]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return write


def test_trainings_by_name_and_by_file(comfy, run):
    from comfyui_personalize.nodes.loss_curves import CompareLossCurves

    run("long", enumerate([1.0 - 0.01 * step for step in range(40)]))
    run("short", enumerate([1.0 - 0.01 * step for step in range(20)]), [(0, 0.9), (16, 0.75)])
    node = CompareLossCurves.PREPARE_CLASS_CLONE(None)
    plot, table = node.execute(run_1="long.safetensors", run_2=" short", run_3="").result
    assert plot.shape == (1, 432, 768, 3)
    assert table.splitlines()[2:] == ["| long | 40 | 0.6150 | – |", "| short | 20 | 0.8100 | 0.7500 |"]
    before = CompareLossCurves.fingerprint_inputs(run_1="short", run_2=None)
    run("short", enumerate([0.5] * 30))
    assert CompareLossCurves.fingerprint_inputs(run_1="short", run_2=None) != before


def test_what_is_no_training_is_refused(comfy, run):
    from comfyui_personalize.models.errors import ConfigError, FormatError
    from comfyui_personalize.nodes.loss_curves import CompareLossCurves

    with pytest.raises(ConfigError, match="no training to show; connect a trainer's first output"):
        CompareLossCurves.execute(run_1="", run_2=None)
    with pytest.raises(FormatError, match=r"nobody: no log.jsonl with losses there; give the name"):
        CompareLossCurves.execute(run_1="nobody")
    run("odd", [])
    (comfy.base / "output" / "personalize" / "odd" / "log.jsonl").write_text('{"step": "x", "loss": 1}\n')
    with pytest.raises(FormatError, match=r"odd/log.jsonl is no log of a training"):
        CompareLossCurves.execute(run_1="odd")
    assert CompareLossCurves.validate_inputs(run_1="../elsewhere", run_2=None) is not True
    assert CompareLossCurves.validate_inputs(run_1="my_dog.safetensors", run_2="") is True
