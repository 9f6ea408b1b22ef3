"""Training states: everything that decides the rest of a run, in one safetensors file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.errors import ConfigError, FormatError
from ..models.formats import FORMAT_KEY, read_header, read_safetensors, write_safetensors
from .optimizer import ParameterGroup

STATE_FORMAT = "training-state/1"


class Stateful(Protocol):
    """Anything whose state is tensors and JSON values under string keys."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GeneratorState:
    """A torch.Generator as a Stateful."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].to("cpu", torch.uint8))


class Checkpoints:
    """Writes, prunes and restores the training states of one run."""

    def __init__(
        self,
        folder: Path | None,
        limit: int,
        fingerprint: str,
        *,
        groups: Sequence[ParameterGroup],
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        scaler: torch.amp.GradScaler,
        others: Mapping[str, Stateful],
    ) -> None:
        self._folder, self._limit, self._fingerprint = folder, limit, fingerprint
        self._parameters = {f"{g.name}.{name}": p for g in groups for name, p in g.parameters.items()}
        self._optimizer, self._schedule, self._scaler, self._others = optimizer, schedule, scaler, others

    def save(self, step: int) -> Path | None:
        """Write the state after ``step`` optimizer steps, then delete states beyond the limit."""
        if self._folder is None:
            return None
        for leftover in self._folder.glob(".state-*.partial"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        tensors = {f"parameter.{name}": p for name, p in self._parameters.items()}
        values: dict[str, Any] = {"step": step, "schedule": _jsonable(self._schedule.state_dict())}
        values["learning_rates"] = [group["lr"] for group in self._optimizer.param_groups]
        values["scaler"] = self._scaler.state_dict()
        # bitsandbytes nests the tensors of its own dictionary, and reads them unnested too.
        for index, entries in torch.optim.Optimizer.state_dict(self._optimizer)["state"].items():
            _split(f"optimizer.{index}", entries, tensors, values)
        for name, other in self._others.items():
            _split(f"other.{name}", other.state_dict(), tensors, values)
        metadata = {FORMAT_KEY: STATE_FORMAT, "fingerprint": self._fingerprint, "values": json.dumps(values)}
        path = write_safetensors(self._folder / f"state-{step:08d}.safetensors", tensors, metadata, overwrite=True)
        for old in newest_states(self._folder)[self._limit :]:
            old.unlink(missing_ok=True)
        return path

    def clear(self) -> None:
        """Delete the states of an earlier run of the same name, which a new run makes meaningless."""
        for path in newest_states(self._folder):
            path.unlink(missing_ok=True)

    def load_newest(self) -> int:
        """Restore the newest state; the step it was taken at, or 0 when there is none.

        Raises what check_resumable raises.
        """
        paths = newest_states(self._folder)
        if not paths:
            return 0
        _check(paths[0], self._fingerprint)
        with _damage_explained(paths[0]):
            tensors, metadata = read_safetensors(paths[0])
        values = json.loads(metadata["values"])
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        optimizer_state = self._optimizer.state_dict()
        optimizer_state["state"] = {
            index: entries
            for index in range(len(self._parameters))
            if (entries := _join(f"optimizer.{index}", tensors, values))
        }
        self._optimizer.load_state_dict(optimizer_state)
        self._schedule.load_state_dict(values["schedule"])
        for group, rate in zip(self._optimizer.param_groups, values["learning_rates"], strict=True):
            group["lr"] = rate
        self._scaler.load_state_dict(values["scaler"])
        for name, other in self._others.items():
            other.load_state_dict(_join(f"other.{name}", tensors, values))
        return values["step"]


def check_states(folder: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> bool:
    """Whether a run continues an earlier one; refuses to throw away a state that it would not continue.

    Raises:
        ConfigError: there is a state and neither ``resume`` nor ``overwrite`` is set, or it does not fit.
        FormatError: the state is damaged.
    """
    if resume:
        return check_resumable(folder, fingerprint)
    if not overwrite and (states := newest_states(folder)):
        step = int(states[0].stem.removeprefix("state-"))
        raise ConfigError(
            f"there is a training state of {folder.name} from step {step}; turn on resume to continue it, turn on "
            "overwrite to start anew, or choose another output name"
        )
    return False


def check_resumable(folder: Path | None, fingerprint: str) -> bool:
    """Whether a run has a state to continue from; only the newest one's header is read.

    Raises:
        ConfigError: the state belongs to other settings, pictures, another base model or another stopping rule.
        FormatError: the state is damaged.
    """
    paths = newest_states(folder)
    if paths:
        _check(paths[0], fingerprint)
    return bool(paths)


def _check(path: Path, fingerprint: str) -> None:
    with _damage_explained(path):
        metadata = read_header(path).metadata
        if metadata.get(FORMAT_KEY) != STATE_FORMAT:
            raise FormatError(f"expected a {STATE_FORMAT} file")
    if metadata.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"the training state {path.name} was made with other settings, pictures, base model or stopping rule; "
            "restore them, turn resume off, or train under another name"
        )


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise FormatError(
            f"the training state {path.name} is damaged ({error}); delete it to continue from an older one, or turn "
            "resume off"
        ) from error


def newest_states(folder: Path | None) -> list[Path]:
    """Training states in a run's folder, newest first."""
    if folder is None or not folder.is_dir():
        return []
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def _jsonable(state: dict[str, Any]) -> dict[str, Any]:
    # LambdaLR lists its lambdas, which are None for plain functions; they are rebuilt from the config.
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state.get("lr_lambdas", []))
    }


def _split(prefix: str, entries: Mapping[str, Any], tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    plain = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{key}"] = value
        else:
            plain[key] = value
    values[prefix] = plain


def _join(prefix: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{prefix}."
    return values.get(prefix, {}) | {key[len(start) :]: t for key, t in tensors.items() if key.startswith(start)}
