"""The project's card: versions agree, bounds stay lower bounds, and the host understands the classifiers."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOWER_BOUND = re.compile(r"[A-Za-z0-9_.-]+>=[0-9]+(\.[0-9]+)*")
# What comfy_config/config_parser.py of ComfyUI 0.3.64 and 0.10.0 knows; one other value voids them all.
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
SYSTEMS = ("Microsoft", "POSIX", "MacOS", "OS Independent")


def requirements() -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def test_the_version_is_the_newest_entry_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.group(1) == PYPROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", newest.group(1)), "the registry wants three numbers"


def test_requirements_are_lower_bounds():
    extras = [line for lines in PYPROJECT["project"]["optional-dependencies"].values() for line in lines]
    assert [line for line in requirements() + extras if not LOWER_BOUND.fullmatch(line)] == []


def test_requirements_name_what_the_layers_import():
    names = {line.split(">")[0].lower() for line in requirements()}
    assert {"torch", "diffusers", "transformers", "safetensors", "peft", "accelerate", "einops"} <= names
    assert not names & {"torchvision", "torchaudio", "insightface", "open_clip_torch"}


def test_torch_is_pinned_for_the_tests_only():
    assert "torch==" in (ROOT / "tests/constraints.txt").read_text()
    assert not re.search(r"torch[<=~!]", "\n".join(requirements()))


def test_the_registry_accepts_the_name():
    assert "comfyui" not in PYPROJECT["project"]["name"].lower()
    assert PYPROJECT["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName", "requires-comfyui"}


def test_the_host_knows_every_classifier():
    classifiers = PYPROJECT["project"]["classifiers"]
    systems = [line.removeprefix("Operating System :: ") for line in classifiers if line.startswith("Operating System")]
    accelerators = {line.removeprefix("Environment :: ") for line in classifiers if line.startswith("Environment ::")}
    assert systems and all(line.startswith(SYSTEMS) for line in systems)
    assert accelerators and accelerators <= ACCELERATORS
    assert any(line.startswith("Environment :: GPU :: ") for line in classifiers)


def test_the_licence_is_apache_2():
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_every_data_file_is_packaged():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, globs in patterns.items()
        for pattern in globs
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    on_disk = {
        path
        for folder in ("models", "nodes", "trainers", "workflows")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".json", ".toml", ".txt")
    }
    assert on_disk, "model configurations, examples and workflows are data files"
    assert sorted(on_disk - packaged) == []
