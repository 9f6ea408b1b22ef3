"""The demo from start to end with very few steps, in ComfyUI and without it."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

DEMO = Path(__file__).resolve().parent / "run.py"


def run_demo(out, *words):
    """Its output; the test fails with it when the demo does."""
    command = [sys.executable, str(DEMO), "--out", str(out), "--steps", "4", "--sampling-steps", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_results(out, printed):
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    trained = {"loras/demo_toy.safetensors", "embeddings/demo_toy.safetensors", "tiny_sdxl.safetensors"}
    scales = ("plain", "reward_0", "reward_1", "reward_3", "reward_5")
    pictures = {f"pictures/prompt_{number}_{scale}.png" for number in (1, 2) for scale in scales}
    assert made == {"pictures.png", "loss_curve.png"} | trained | pictures
    assert all(f"  {name} " in printed for name in made)
    contents = {name: Image.open(out / name).tobytes() for name in pictures}
    assert len(set(contents.values())) == len(pictures), "every scale and every prompt gives another picture"
    assert Image.open(out / "pictures.png").width > 900
    with safe_open(out / "embeddings" / "demo_toy.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["clip_g", "clip_l"]


@pytest.mark.slow
def test_without_comfyui_the_command_line_does_the_job(tmp_path):
    out = tmp_path / "demo"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "old.png").touch()  # of an earlier run
    printed = run_demo(out, "--without-comfyui")
    assert printed.count("Without ComfyUI") == 1
    assert "$ python -m comfyui_personalize.trainers dco --config" in printed
    check_results(out, printed)


@pytest.mark.slow
@pytest.mark.host
def test_with_comfyui_the_shipped_workflows_do_the_job(comfyui, tmp_path):
    printed = run_demo(tmp_path / "demo")
    assert f"Starting {comfyui}" in printed
    assert "workflows/api/dco_train_subject.json" in printed
    check_results(tmp_path / "demo", printed)
