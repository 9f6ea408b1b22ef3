"""Training from the command line, in one process and in two, as people start it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfyui_personalize.models.dvar import PRESETS, EvaluationSettings
from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.trainers import __main__ as command_line
from comfyui_personalize.trainers.config import apply_overrides, build, read_toml
from comfyui_personalize.trainers.dco.config import DCOConfig, DCORun
from comfyui_personalize.trainers.initializers import InitializerSettings
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.plateau import CLIPPlateau, PictureSettings
from comfyui_personalize.trainers.settings import RunSettings
from comfyui_personalize.trainers.stopping import DVAR

ROOT = Path(__file__).parents[3]
RUNNER = ROOT / "tests" / "tiny" / "run_trainer.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path, tiny_checkpoint):
    """A TOML file for a short training of an SD1.5 subject."""
    for index in range(4):
        picture = Image.effect_noise((72 + 8 * index, 72), 60).convert("RGB")
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a <dog> number {index}")
    path = tmp_path / "run.toml"
    path.write_text(f"""
        device = "cpu"
        [base]
        path = '{tiny_checkpoint("sd15")}'
        [dataset]
        folder = '{tmp_path / "pictures"}'
        tokens = [{{ trigger = "<dog>", initializer = "dog" }}]
        [output]
        name = "my_dog"
        folder = '{tmp_path / "out"}'
        [train]
        steps = 3
        batch_size = 2
        resolution = 64
        rank = 2
        beta = 10.0
        learning_rate = 1e-3
        text_learning_rate = 1e-3
        save_precision = "fp32"
    """)
    return path


@pytest.fixture
def here(config):
    """Run in this process, with the number of threads that other processes are given, so that sums are equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *words: command_line.main(["dco", "--config", str(config), *words])
    torch.set_num_threads(threads)


def start(*words, launcher=(), **options):
    command = [sys.executable, *launcher, str(RUNNER), "dco", "--config", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd="/", env=ENVIRONMENT, **pipes, **options)


def finish(process, seconds=180):
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def lora(tmp_path, name):
    return load_file(tmp_path / "out" / "loras" / f"{name}.safetensors")


def token(tmp_path, name):
    return load_file(tmp_path / "out" / "embeddings" / f"{name}.safetensors")


def losses(tmp_path, name):
    lines = (tmp_path / "out" / "runs" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# In this process


def test_a_run_from_toml_to_files(config, tmp_path, capsys):
    assert command_line.main(["dco", "--config", str(config), "train.steps=2", "output.name=other dog"]) == 0
    output = capsys.readouterr().out
    assert "2 steps (all steps done)" in output and "saved " in output
    assert (tmp_path / "out" / "loras" / "other dog.safetensors").is_file()
    assert (tmp_path / "out" / "embeddings" / "other dog.safetensors").is_file()
    assert len(losses(tmp_path, "other dog")) == 2


def test_a_rule_that_samples_pictures(config, tiny_clip, capsys):
    words = ["stopping.rule=clip", "stopping.patience=0", "stopping.eps=1.0", "stopping.every=1"]
    words += [f"stopping.pictures.clip={tiny_clip}", "stopping.pictures.count=1", "stopping.pictures.steps=1"]
    assert command_line.main(["dco", "--config", str(config), *words]) == 0
    assert "2 steps (CLIP plateau: the similarity to the pictures did not rise" in capsys.readouterr().out


def test_overrides_may_stand_anywhere(config):
    for words in (["dco", "--config", str(config), "device=banana"], ["dco", "device=banana", "--config", str(config)]):
        assert command_line.main(words) == 1


def check_one_line(capsys, part):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: .*{part}.*\n", captured.err), captured.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train.stepz=5"], "unknown setting.s. stepz in train"),
        (["train.steps=0"], "DCOConfig.steps must be at least 1, got 0"),
        (["train.precision=fp16"], "precision fp16 needs a GPU"),
        (["device=banana"], "device 'banana' cannot be used here"),
        (["base.path=missing.safetensors"], "missing.safetensors: no such checkpoint"),
        (["dataset.folder=/nowhere"], "nowhere"),
        (["dataset.captions=['a cat']"], "contains none of the learned tokens"),
        (["output.name=../up"], "output name '../up' contains a path separator"),
        (["base=5"], "base must be a table of settings, got 5"),
        (["steps"], "'steps' is not an override"),
        (["stopping.rule=luck"], "stopping.rule must be one of dvar, clip, fixed, got 'luck'"),
        (["stopping.rule=clip"], "stopping lacks pictures"),
        (["stopping.rule=clip", "stopping.pictures.clip=/nowhere"], "/nowhere: no CLIP there for the CLIP plateau"),
    ],
)
def test_mistakes_are_one_line(words, part, config, capsys, tmp_path):
    assert command_line.main(["dco", "--config", str(config), *words]) == 1
    check_one_line(capsys, part)
    assert not (tmp_path / "out").exists()


def test_a_missing_config_file_is_one_line(capsys, tmp_path):
    assert command_line.main(["dco", "--config", str(tmp_path / "none.toml")]) == 1
    check_one_line(capsys, "none.toml could not be read")


def test_an_unknown_recipe_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(["unheard-of", "--config", "x"])
    assert caught.value.code == 2 and "dco" in capsys.readouterr().err


# The example


def test_the_example_is_a_whole_run_with_the_defaults():
    values = read_toml(ROOT / "trainers" / "dco" / "example.toml")
    run = build(DCORun, values)
    assert run.train == DCOConfig()
    assert isinstance(run.output.place(), OutputPlace)
    text = (ROOT / "trainers" / "dco" / "example.toml").read_text()
    assert values["train"].keys() == DCOConfig().as_dict().keys()
    assert text.startswith(
        "# python -m comfyui_personalize.trainers dco --config trainers/dco/example.toml train.steps="
    )
    for table in ("base", "dataset", "output"):
        for name in build(DCORun, values).__getattribute__(table).__dataclass_fields__:
            assert re.search(rf"^(# )?({name} = |\[{table}\.{name}\])", text, re.MULTILINE), f"{table}.{name}"
    assert build(DCORun, apply_overrides(values, ["train.steps=500"])).train.steps == 500


def test_the_example_s_stopping_rule_has_the_defaults_when_it_is_turned_on():
    text = (ROOT / "trainers" / "dco" / "example.toml").read_text()
    start = text.index("# [stopping]")
    values = tomllib.loads(text[:start] + re.sub("^# ", "", text[start:], flags=re.MULTILINE))
    assert build(DCORun, values).stopping == DVAR()
    assert values["stopping"].keys() == DVAR.__dataclass_fields__.keys()
    assert values["stopping"]["evaluation"].keys() == EvaluationSettings.__dataclass_fields__.keys()
    assert build(DCORun, read_toml(ROOT / "trainers" / "dco" / "example.toml")).stopping is None
    with pytest.raises(ConfigError, match="eps must be above 0"):
        build(DCORun, apply_overrides(values, ["stopping.eps=0.0"]))


@pytest.mark.parametrize(
    "name", ["dco/", "perfusion/", "dvar/textual_inversion.", "dvar/dreambooth.", "dvar/custom_diffusion."]
)
def test_the_examples_show_the_other_rule_and_the_choice_of_words(name):
    text = (ROOT / "trainers" / f"{name}example.toml").read_text()
    turned_on = re.sub("^# # ", "", text[text.index("# # [stopping]") :], flags=re.MULTILINE)
    values = tomllib.loads(text[: text.index("# [stopping]")] + turned_on)
    rule = build(RunSettings, {name: values[name] for name in ("base", "dataset", "output", "stopping")}).stopping
    assert values["stopping"].keys() == CLIPPlateau.__dataclass_fields__.keys() | {"rule"}
    assert values["stopping"]["pictures"].keys() == PictureSettings.__dataclass_fields__.keys()
    authors = [(p.clip_patience, p.clip_eps, p.clip_sampling_steps, p.clip_guidance) for p in PRESETS.values()]
    assert (rule.patience, rule.eps, rule.pictures.steps, rule.pictures.guidance) in authors
    start, end = text.index("# [dataset.initializer]"), text.index("[output]")
    shown = tomllib.loads(re.sub("^# ", "", text[start:end], flags=re.MULTILINE))["dataset"]["initializer"]
    assert shown.keys() == InitializerSettings.__dataclass_fields__.keys()
    assert build(InitializerSettings, shown).strategy == "best"


# As a program


def test_ctrl_c_saves_and_the_same_command_goes_on(config, tmp_path, here):
    process = start(config, "train.steps=100000", "output.name=stopped")
    log = tmp_path / "out" / "runs" / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 130 and "Traceback" not in errors
    steps = len(losses(tmp_path, "stopped"))
    assert f"{steps} steps (cancelled)" in output
    state = tmp_path / "out" / "runs" / "stopped" / f"state-{steps:08d}.safetensors"
    assert state.is_file() and lora(tmp_path, "stopped") and token(tmp_path, "stopped")

    assert here(f"train.steps={steps + 2}", "output.name=stopped", "train.resume=true") == 0
    assert here(f"train.steps={steps + 2}", "output.name=whole") == 0
    assert losses(tmp_path, "stopped") == losses(tmp_path, "whole")
    first, second = lora(tmp_path, "stopped"), lora(tmp_path, "whole")
    assert all(torch.equal(first[name], second[name]) for name in second)


# Two processes

TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")


SMOOTH = ("train.steps=4", "train.adam_epsilon=0.01", "train.learning_rate=1e-2")
"""Makes updates nearly proportional to gradients, where AdamW would turn the rounding of tiny ones into steps."""


def check_alike(tmp_path, one, two):
    """The files of two runs hold the same weights but for the order of sums, and these did change."""
    for read in (lora, token):
        first, second = read(tmp_path, one), read(tmp_path, two)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
    assert max(value.abs().max() for name, value in lora(tmp_path, one).items() if "lora_up" in name) > 1e-3


@pytest.fixture
def two(free_port):
    """The launcher of two processes on this machine."""
    return (*TWO, str(free_port()))


@pytest.fixture
def free_port():
    """Find a port that nobody listens on."""
    import socket

    def find():
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return server.getsockname()[1]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("beta", [10, 0])
def test_two_processes_train_like_one_with_twice_the_batch(beta, config, tmp_path, two, here):
    common = (f"train.beta={beta}", "train.offset_noise=0.1", "train.snr_gamma=5", *SMOOTH)
    assert here(*common, "train.batch_size=2", "output.name=one") == 0
    words = ("train.batch_size=1", "output.name=two", "train.preview_every=4", "train.preview_steps=1")
    pair = finish(start(config, *common, *words, launcher=two))
    assert pair[0] == 0, pair[2]
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    check_alike(tmp_path, "one", "two")
    # One writer: a single summary, each file once, and no line of the log twice.
    assert pair[1].count("all steps done") == 1 and pair[1].count("saved ") == 2
    assert len(losses(tmp_path, "two")) == 4
    folder = tmp_path / "out" / "runs" / "two"
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "preview-000004.jpg"]


@pytest.mark.slow
def test_two_processes_resume_where_they_stopped(config, tmp_path, free_port, here, capsys):
    assert here("train.batch_size=2", *SMOOTH, "output.name=one") == 0
    words = ("train.batch_size=1", *SMOOTH, "output.name=parts", "train.checkpoint_every=2")
    for more in ("train.steps=2",), ("train.resume=true",):
        code, _, errors = finish(start(config, *words, *more, launcher=(*TWO, str(free_port()))))
        assert code == 0, errors
    assert losses(tmp_path, "parts") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    check_alike(tmp_path, "one", "parts")
    states = sorted(path.name for path in (tmp_path / "out" / "runs" / "parts").glob("state*"))
    assert states == ["state-00000002.safetensors", "state-00000004.safetensors"]
    # A single process with this batch size would draw other batches.
    assert here(*words, "train.resume=true") == 1
    assert "was made with other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launch_starts_the_same_program(config, tmp_path, here):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    code, output, errors = finish(start(config, "output.name=launched", launcher=launcher))
    assert code == 0, errors
    assert "3 steps (all steps done)" in output
    assert here("output.name=alone") == 0
    assert losses(tmp_path, "launched") == losses(tmp_path, "alone")
