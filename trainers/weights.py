"""Weights on disk: names and shapes at once, tensors only when asked for, a few at a time."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.errors import FormatError
from ..models.formats import read_header, read_weights

SAFETENSORS_SUFFIXES = {".safetensors", ".sft"}
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Weights:
    """Named tensors in one file, or in the several files of a sharded model."""

    paths: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, *paths: Path) -> "Weights":
        """Read names and shapes; only the header of a safetensors file, the whole of a pickled one."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            if path.suffix.lower() in SAFETENSORS_SUFFIXES:
                shapes |= read_header(path).shapes
            else:
                shapes |= {name: tuple(tensor.shape) for name, tensor in read_weights(path)[0].items()}
        return cls(tuple(paths), shapes)

    @property
    def name(self) -> str:
        """File name for messages."""
        return self.paths[0].name

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors whose name starts with ``prefix``, which is taken off."""
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors by name on the CPU, floating ones cast to ``dtype``; FormatError when the file is damaged."""
        wanted = set(names)
        tensors: dict[str, Tensor] = {}
        for path in self.paths:
            if path.suffix.lower() in SAFETENSORS_SUFFIXES:
                try:
                    with safe_open(path, framework="pt", device="cpu") as file:
                        for name in wanted.intersection(file.keys()):
                            tensors[name] = _cast(file.get_tensor(name), dtype)
                except (SafetensorError, OSError) as error:
                    raise FormatError(
                        f"{path.name}: damaged safetensors file ({error}); download or copy it again"
                    ) from error
            else:
                contents = read_weights(path)[0]
                tensors |= {name: _cast(contents[name], dtype) for name in wanted.intersection(contents)}
        return tensors

    def digest(self) -> str:
        """Cheap identity of the contents: sizes, beginnings and blocks spread evenly over each file."""
        hasher = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            hasher.update(size.to_bytes(8, "little"))
            with path.open("rb") as file:
                hasher.update(file.read(1 << 20))
                for sample in range(1, _SAMPLES + 1):
                    file.seek(max(0, size * sample // _SAMPLES - _SAMPLE_BYTES))
                    hasher.update(file.read(_SAMPLE_BYTES))
        return hasher.hexdigest()[:32]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def component_files(folder: Path, stem: str, legacy: str) -> tuple[Path, ...]:
    """Weight files of one part of a diffusers folder, the fullest precision and the safest format first.

    Args:
        folder: such as ``<model>/unet``.
        stem: file name without suffix, such as ``diffusion_pytorch_model``.
        legacy: file name of the pickled form, tried last.
    """
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return (folder / name,)
    for index in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
        if (folder / index).is_file():
            return tuple(folder / name for name in sorted(set(read_json(folder / index)["weight_map"].values())))
    if (folder / legacy).is_file():
        return (folder / legacy,)
    raise FormatError(f"{folder}: holds no weights; expected {stem}.safetensors, download the model again")


def read_json(path: Path) -> dict:
    """A JSON object from a small file; FormatError when it is absent or damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: could not be read as JSON ({error}); download the model again") from error
    if not isinstance(contents, dict):
        raise FormatError(f"{path}: holds no JSON object; download the model again")
    return contents
