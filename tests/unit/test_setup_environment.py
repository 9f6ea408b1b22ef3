"""Set-up for the demo and the tests: what is taken from the host, when it runs again, how it refuses."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "tests/setup_environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    (tmp_path / "requirements.txt").write_text("frontend==1.2\ntorch\ntorchsde\ntorchvision\ntorchaudio>=2\n\n# more\n")
    return tmp_path


def test_the_hosts_torch_is_left_out_and_its_other_needs_stay(setup, host):
    lines = [line for line in setup.host_requirements(host).splitlines() if line]
    assert lines == ["frontend==1.2", "torchsde", "# more"]


def test_it_runs_again_when_what_the_host_needs_changes(setup, host):
    before = setup.fingerprint(host)
    assert before == setup.fingerprint(host) != setup.fingerprint(None)
    (host / "requirements.txt").write_text("frontend==1.3\n")
    assert setup.fingerprint(host) != before


def test_a_finished_environment_is_left_alone(setup, host, tmp_path, monkeypatch):
    venv, installs = tmp_path / "venv", []
    venv.mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    monkeypatch.setattr(sys, "argv", ["setup_environment.py", "--venv", str(venv)])
    monkeypatch.setattr(setup, "install", lambda *arguments: installs.append(arguments))
    assert [setup.main(), setup.main()] == [0, 0]
    assert installs == [(venv, host)]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [("python", "Python 3.11 or newer is needed"), ("host", "COMFYUI_PATH is"), ("pip", "failed with status")],
)
def test_it_refuses_in_one_sentence_and_leaves_no_stamp(wrong, sentence, setup, host, tmp_path, monkeypatch, capsys):
    venv = tmp_path / "venv"
    venv.mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(host / "nowhere" if wrong == "host" else host))
    monkeypatch.setattr(sys, "argv", ["setup_environment.py", "--venv", str(venv)])
    if wrong == "python":
        monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    elif wrong == "pip":  # the environment's Python is a program that fails at once
        (venv / "bin").mkdir()
        (venv / "bin/python").symlink_to(shutil.which("false"))
    assert setup.main() == 1
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert not (venv / setup.STAMP).exists()
