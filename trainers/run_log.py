"""What a run writes down while it trains, log.jsonl and the preview pictures, and how a log is read again."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from PIL import Image

from ..models.errors import FormatError

LOG = "log.jsonl"


@dataclass(frozen=True)
class LoggedRun:
    """The course of a run, as its log has it."""

    losses: list[float]
    """Of each optimizer step."""
    evaluations: list[tuple[int, float]]
    """Steps done and the loss on the evaluation batch, where a stopping rule asked for it."""


def read_log(folder: Path) -> LoggedRun:
    """Read the log of a run, finished or not.

    Raises:
        FormatError: no log there, or not one of a training.
    """
    found = LoggedRun([], [])
    try:
        for values in map(json.loads, _lines(folder / LOG)):
            step, stepped = int(values["step"]), "loss" in values
            if stepped:
                found.losses.append(float(values["loss"]))
            if "evaluation" in values:  # what a step has beside its loss was measured before it
                found.evaluations.append((step - stepped, float(values["evaluation"])))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{folder.name}/{LOG} is no log of a training ({error}); train again") from error
    if not found.losses:
        raise FormatError(f"{folder.name}: no {LOG} with losses there; give the name of a training that was run here")
    return found


class RunLog:
    """One JSON line per optimizer step, and the preview pictures; nothing is on disk before the first step is done.

    What a rule measured after the last step has a line of its own, which a run that goes on from there drops.
    """

    def __init__(self, folder: Path | None, resumed_at: int) -> None:
        """Args:
        folder: the run's folder; None keeps nothing.
        resumed_at: step that the run continues from; lines of later steps are dropped.
        """
        self._folder, self._resumed_at, self._file = folder, resumed_at, None

    def write(self, step: int, measured: Mapping[str, float]) -> None:
        """Args: measured: loss, rate and what was evaluated before the step, by name."""
        if self._folder is None:
            return
        path = self._folder / LOG
        with _writing(path):
            self._file = self._file or self._open(path)
            self._file.write(json.dumps({"step": step, **measured}) + "\n")
            self._file.flush()

    def _open(self, path: Path) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [(line, json.loads(line)) for line in _lines(path)]
        kept = [line for line, values in found if values["step"] <= self._resumed_at and "loss" in values]
        file = path.open("w", encoding="utf-8")
        file.writelines(kept)
        return file

    def save_preview(self, step: int, picture: Image.Image) -> None:
        if self._folder:
            path = self._folder / f"preview-{step:06d}.jpg"
            with _writing(path):
                picture.save(path, quality=92)

    def close(self) -> None:
        if self._file:
            self._file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FormatError(
            f"{path.name} could not be written in {path.parent} ({error.strerror or error}); "
            "free space or choose a writable folder"
        ) from error


def _lines(path: Path) -> list[str]:
    """Complete lines; a crash may have cut the last one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
