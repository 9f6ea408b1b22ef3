"""The demo from start to end with very few steps, in ComfyUI and without it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

DEMO = Path(__file__).resolve().parent / "run.py"


def run_demo(out, *words):
    """Its output; the test fails with it when the demo does."""
    command = [sys.executable, str(DEMO), "--out", str(out), "--steps", "4", "--sampling-steps", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_results(out, printed):
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    trained = {"loras/demo_zib.safetensors", "embeddings/demo_zib.safetensors"}
    columns = ("before_word", "before_description", "after_plain", "after_reward_1", "after_reward_2", "after_reward_4")
    pictures = {f"pictures/prompt_{number}_{column}.png" for number in (1, 2, 3) for column in columns}
    assert made == {"pictures.png", "loss_curve.png"} | trained | pictures
    assert all(f"  {name} " in printed for name in made)
    contents = {name: Image.open(out / name).tobytes() for name in pictures}
    assert len(set(contents.values())) == len(pictures), "every way to draw and every prompt gives another picture"
    assert Image.open(out / "pictures.png").width > 900
    assert load_file(out / "embeddings" / "demo_zib.safetensors").keys() == {"clip_l", "clip_g"}


@pytest.fixture(scope="module")
def without_comfyui(tmp_path_factory):
    """(folder, output) of a demo on the command line, over the pictures of an earlier one."""
    out = tmp_path_factory.mktemp("without")
    (out / "pictures").mkdir()
    (out / "pictures" / "old.png").touch()
    return out, run_demo(out, "--without-comfyui")


def test_without_comfyui_the_command_line_does_the_job(without_comfyui):
    out, printed = without_comfyui
    assert printed.count("Without ComfyUI") == 1
    assert "$ python -m comfyui_personalize.trainers dco --config" in printed
    check_results(out, printed)


@pytest.mark.host
def test_in_comfyui_the_shipped_workflows_train_the_same_weights(comfyui, without_comfyui, tmp_path):
    printed = run_demo(tmp_path)
    assert f"Starting {comfyui}" in printed
    assert "workflows/api/dco_train_subject.json" in printed
    check_results(tmp_path, printed)
    for name in ("loras/demo_zib.safetensors", "embeddings/demo_zib.safetensors"):
        here, there = load_file(tmp_path / name), load_file(without_comfyui[0] / name)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)
