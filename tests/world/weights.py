"""The small world's trained weights: found, checked against their card, and the card written.

The files lie in weights/ beside this module. card.json there says what each of them is the output of, README.md
says the same to people.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

from safetensors import safe_open

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "weights"
CARD = "card.json"
STAGES = {
    "world_sd15.safetensors": "sd15",
    "world_sdxl.safetensors": "sdxl",
    "world_scorer.safetensors": "scorer",
    "world_clip.safetensors": "clip",
    "world_identity.safetensors": "identity",
}
"""Every file, and the stage of train.py that makes it."""
_SUMMARIES = {
    "world_sd15.safetensors": "text to image, laid out like SD1.5",
    "world_sdxl.safetensors": "text to image, laid out like SDXL",
    "world_scorer.safetensors": "reads what a picture shows",
    "world_clip.safetensors": "image and text towers, like CLIP",
    "world_identity.safetensors": "embeds faces by who they are",
}


class WeightsError(RuntimeError):
    """A weights file is absent or is not the one that the card describes."""


# Found


def path_of(file: str, folder: Path = FOLDER) -> Path:
    """The file, if its SHA-256 is the one in the card; a file is read once per process for that.

    Raises:
        WeightsError: the file or its entry is missing, or the file is another one.
    """
    if file not in STAGES:
        raise WeightsError(f"{file} is no weights file of the small world; there are {', '.join(STAGES)}")
    make = f"python tests/world/train.py --only {STAGES[file]}"
    described = "python tests/world/train.py --only card"
    expected = read_card(folder)["files"].get(file, {}).get("sha256")
    if expected is None:
        raise WeightsError(f"{file} is not in {CARD}; make it with `{make}` and describe it with `{described}`")
    path = folder / file
    if not path.is_file():
        raise WeightsError(f"{file} is missing (SHA-256 {expected} is expected); retrain it with `{make}`")
    stat = path.stat()
    if (found := _digest(path, stat.st_size, stat.st_mtime_ns)) != expected:
        raise WeightsError(
            f"{file} has SHA-256 {found}, expected {expected}; restore the committed file, or retrain it with "
            f"`{make}` and describe it with `{described}`"
        )
    return path


def read_card(folder: Path = FOLDER) -> dict:
    """What card.json says; without files where there is none."""
    path = folder / CARD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"files": {}}


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    """SHA-256 of the file's contents; size and time are there so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Described


@dataclass(frozen=True)
class Run:
    """What a file is the output of."""

    seed: int
    steps: int
    """Of its own training, not counting the one it began from."""
    data: str
    """What it was trained on, in words."""
    commit: str
    """The last that changed the world's or the models' code; ends in "-dirty" when that code had been changed."""
    machine: str
    date: str
    """Of its end, ISO 8601, UTC."""

    @classmethod
    def now(cls, *, seed: int, steps: int, data: str) -> Run:
        """A run of this moment, at this commit and on this machine."""
        date = datetime.now(UTC).isoformat(timespec="minutes")
        return cls(seed, steps, data, _commit(), machine(), date)


def machine() -> str:
    """Processor, cores and torch."""
    return f"{_processor()}, {os.cpu_count()} cores, torch {version('torch')}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    code = [str(HERE), str(HERE.parent / "tiny"), f":(exclude){FOLDER}"]

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *code]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%H") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def write_card(
    runs: Mapping[str, Run],
    scores: Mapping[str, Mapping],
    sheets: Mapping[str, Path],
    folder: Path = FOLDER,
) -> None:
    """Write card.json and README.md about the files in the folder.

    Args:
        runs: file -> its training.
        scores: file -> what `evaluate.evaluate` returned for a checkpoint, or for others name -> number, nested or not.
        sheets: file -> sample sheet in the folder.

    Raises:
        WeightsError: a file of ``runs`` is not in the folder, or one in the folder has no run.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if unequal := present ^ runs.keys():
        raise WeightsError(
            f"{', '.join(sorted(unequal))}: every weights file needs a run and every run a file, in {folder}"
        )
    files = {}
    for file in (file for file in STAGES if file in runs):
        path = folder / file
        stat = path.stat()
        entry = {"sha256": _digest(path, stat.st_size, stat.st_mtime_ns), "bytes": stat.st_size}
        files[file] = entry | {"parameters": _parameters(path)} | asdict(runs[file])
        files[file]["scores"] = scores.get(file, {})
        if file in sheets:
            files[file]["sheet"] = sheets[file].name
    card = {"files": files}
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(card), encoding="utf-8")


def _parameters(path: Path) -> int:
    with safe_open(path, "numpy") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    count = 0
    for shape in sizes:
        product = 1
        for size in shape:
            product *= size
        count += product
    return count


# For people


def readme(card: Mapping) -> str:
    """The card as Markdown."""
    files = card["files"]
    total = sum(entry["bytes"] for entry in files.values())
    lines = [
        "# Weights of the small world",
        "",
        "Networks trained on pictures that the code in `tests/world` draws, in half precision. They are small enough "
        "to be committed and good enough that a person sees whether a personalization method works. "
        f"Together {total / 1e6:.1f} MB. Written by `python tests/world/train.py`; `card.json` has the same for "
        "programs, and a file whose SHA-256 is another one is refused.",
        "",
        "| file | what | MB | parameters | steps | seed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for file, entry in files.items():
        numbers = f"{entry['bytes'] / 1e6:.1f} | {entry['parameters'] / 1e6:.2f} M | {entry['steps']} | {entry['seed']}"
        lines.append(f"| `{file}` | {_SUMMARIES[file]} | {numbers} |")
    for file, entry in files.items():
        lines += ["", f"## {file}", "", f"Trained on {entry['data']}.", ""]
        lines += [f"Machine: {entry['machine']}. Commit `{entry['commit']}`, {entry['date']}."]
        if "rows" in entry["scores"]:
            lines += ["", *evaluation_table(entry["scores"])]
        elif entry["scores"]:
            lines += ["", "| measured | value |", "| --- | ---: |"]
            lines += [f"| {name} | {value:.3g} |" for name, value in _flat(entry["scores"])]
        if "sheet" in entry:
            lines += ["", f"![Pictures of {file} with their captions]({entry['sheet']})"]
    return "\n".join(lines) + "\n"


def _flat(scores: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Nested numbers one by one, "outer, inner" -> number."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", value


def evaluation_table(result: Mapping) -> list[str]:
    """What `evaluate.evaluate` returned as lines of Markdown; shares in per cent."""
    used = result["settings"]
    lines = [
        f"Pictures of {used['captions']} captions that no training scene had, sampled by ComfyUI's KSampler "
        f"({used['sampler']}, {used['scheduler']}, {used['steps']} steps, cfg {used['cfg']:g}) and read by the scorer. "
        "The scorer's limit is its share on the drawn pictures themselves, the autoencoder's ceiling the share on "
        "drawn pictures that went through the checkpoint's autoencoder. "
        f"The autoencoder alone: {result['psnr']:.1f} dB on {used['pictures']} unseen pictures.",
        "",
        "| captions of | right | n | sampled | autoencoder's ceiling | scorer's limit |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        shares = " | ".join(f"{100 * row[column]:.1f}" for column in ("sampled", "ceiling", "drawn"))
        lines.append(f"| {row['of']} | {row['right']} | {row['count']} | {shares} |")
    return lines
