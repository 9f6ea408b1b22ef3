"""Set-up for the demo and the tests: what is taken from the host, when it runs again, how it refuses."""

import importlib.util
import shutil
import subprocess
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


@pytest.mark.parametrize("status", [0, 1])
def test_faces_are_an_extra_that_may_be_missing(status, setup, monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(setup.subprocess, "run", run)
    setup.install_faces(["pip", "install"])
    assert all("--only-binary" in command for command in commands)  # never a compiler
    assert not any("opencv-python" in command for command in commands)
    assert ("going on without" in capsys.readouterr().out) == bool(status)


@pytest.fixture
def repository(setup, tmp_path, monkeypatch):
    """A small repository with the wanted release stands for upstream, and a folder of its own for the project."""
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    (upstream / "main.py").touch()
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["tag", setup.COMFYUI_RELEASE]):
        subprocess.run(["git", "-C", str(upstream), *identity, *words], check=True)
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(setup, "ROOT", tmp_path / "project")
    monkeypatch.setattr(setup, "COMFYUI_REPOSITORY", f"file://{upstream}")
    return upstream


def test_comfyui_is_cloned_into_the_project(setup, repository):
    cloned = setup.clone_comfyui()
    assert cloned == setup.ROOT / "ComfyUI"
    assert (cloned / "main.py").is_file()
    assert [path.name for path in setup.ROOT.iterdir()] == ["ComfyUI"]


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("COMFYUI_RELEASE", "v99", "v99"),
        ("COMFYUI_REPOSITORY", "file:///nowhere/at/all", "nowhere"),
        ("CLONE_SECONDS", 0.001, "not done after 0.001 s"),
    ],
)
def test_a_failed_clone_is_said_in_one_line_and_leaves_nothing(
    what, value, reason, setup, repository, monkeypatch, capsys
):
    monkeypatch.setattr(setup, what, value)
    assert setup.clone_comfyui() is None
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 and reason in printed
    assert list(setup.ROOT.iterdir()) == []


@pytest.mark.parametrize(("words", "expected"), [([], 0), (["--clone-comfyui"], 1)])
def test_it_clones_only_when_asked_and_none_is_found(words, expected, setup, tmp_path, monkeypatch):
    clones = []
    monkeypatch.setattr(setup, "find_comfyui", lambda: None)
    monkeypatch.setattr(setup, "clone_comfyui", lambda: clones.append(1))
    monkeypatch.setattr(setup, "install", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["setup_environment.py", "--venv", str(tmp_path), *words])
    assert setup.main() == 0
    assert len(clones) == expected
