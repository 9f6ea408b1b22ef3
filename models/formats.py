"""Reading and writing weight files: atomic writes, safe reads, and metadata by which a file explains itself."""

import json
import os
import re
import struct
import unicodedata
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ConfigError, FormatError
from .tokens import LearnedToken

FORMAT_KEY = "personalize.format"
LAYERS_KEY = "personalize.layers_per_block"
"""Residual blocks of each level of the base's UNet; without it kohya's numbers for SDXL's layers mean nothing."""
_WINDOWS_RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}
_MAX_HEADER_BYTES = 100_000_000


def safe_name(name: str) -> str:
    """Return ``name`` stripped when it can serve as a file name in any folder of any system; ConfigError otherwise.

    Names arrive over the network in workflows, so nothing may lead out of the folder they are meant for.
    """
    stripped = name.strip()
    problem = None
    if not stripped or stripped.strip(".") == "":
        problem = "is empty"
    elif any(character in '/\\:*?"<>|' or unicodedata.category(character) in {"Cc", "Cs"} for character in stripped):
        problem = "contains a path separator or another character that files cannot carry"
    elif stripped.split(".")[0].rstrip().lower() in _WINDOWS_RESERVED:
        problem = "is a reserved device name"
    elif stripped.endswith(".") or len(stripped.encode()) > 200:
        problem = "ends in a dot or is longer than 200 bytes"
    if problem:
        raise ConfigError(f"output name {name!r} {problem}; give a plain name such as my_dog")
    return stripped


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself before any tensor is read."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def format(self) -> str | None:
        """Our own format tag, such as ``lora/1``, or None for a file of another tool."""
        return self.metadata.get(FORMAT_KEY)


def read_header(path: Path) -> Header:
    """Parse a safetensors header; FormatError when the file is absent, truncated or something else."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise FormatError(_not_safetensors(path, size))
            entries = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise FormatError(_not_safetensors(path, size)) from error
    except OSError as error:
        raise FormatError(_unreadable(path, error)) from error
    metadata = (entries.pop("__metadata__", None) or {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict):
        raise FormatError(_not_safetensors(path, size))
    try:
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        dtypes = {key: str(entry["dtype"]) for key, entry in entries.items()}
        if not all(isinstance(n, int) and n >= 0 for shape in shapes.values() for n in shape):
            raise FormatError(_not_safetensors(path, size))
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(_not_safetensors(path, size)) from error
    if end > size:
        raise FormatError(f"{path.name}: truncated, {size} bytes of {end}; download or copy the file again")
    return Header({str(k): str(v) for k, v in metadata.items()}, shapes, dtypes)


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path.name}: could not be read ({error.strerror}); check the path and its permissions"


def _not_safetensors(path: Path, size: int) -> str:
    return f"{path.name}: not a safetensors file ({size} bytes); expected .safetensors, check the download"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors on the CPU, and the metadata; FormatError as read_header.

    Nothing refers to the file afterwards: Windows replaces no file that is still mapped into memory.
    """
    header = read_header(path)
    try:
        return {key: tensor.clone() for key, tensor in load_file(path).items()}, header.metadata
    except SafetensorError as error:
        raise FormatError(
            f"{Path(path).name}: damaged safetensors file ({error}); download or copy it again"
        ) from error


def read_torch_file(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Contents of a legacy .ckpt, .pt, .pth or .bin file, read without running any code it may carry.

    Only tensors, plain containers and ``nn.ParameterDict`` (which the authors' concept files use) are
    allowed; anything else is refused before it is constructed.

    Args:
        mmap: leave the tensors in the file until they are touched; files from before torch 1.6 are read whole.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            mapped = mmap and zipfile.is_zipfile(path)
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise FormatError(_unreadable(path, error)) from error
    # torch reports a refused class, a damaged archive and foreign bytes by different exception types.
    except Exception as error:
        # Its text is not repeated: it advises to read the file without protection.
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"contains {blocked[1]}, which could run code" if blocked else "is damaged or no file of tensors"
        raise FormatError(
            f"{path.name}: refused, it {found}; convert it to .safetensors with a tool you trust, or download it again"
        ) from error
    if not isinstance(contents, dict):
        raise FormatError(f"{path.name}: contains a {type(contents).__name__}, expected named tensors")
    return contents


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and metadata of a weight file of either kind; nested ``state_dict`` entries are unwrapped."""
    path = Path(path)
    if path.suffix.lower() in {".safetensors", ".sft"}:
        return read_safetensors(path)
    contents = read_torch_file(path)
    contents = contents.get("state_dict", contents)
    return {key: value for key, value in contents.items() if isinstance(value, Tensor)}, {}


def refuse_taken(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError when there is a file that must not be replaced."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path.name} exists already in {path.parent.name}; choose another name or allow overwriting")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Write a safetensors file that is either complete or absent.

    The file appears under its name only after everything has reached the disk. Raises ConfigError when
    the name is taken and ``overwrite`` is false, FormatError when the disk refuses; neither leaves a trace.
    """
    contiguous = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        save_file(contiguous, temporary, dict(metadata))

    return write_whole(path, save, overwrite=overwrite)


def write_torch_file(path: Path, contents: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """The same for a legacy .bin file of tensors in plain dictionaries."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(dict(contents), file)
            except RuntimeError as error:  # torch's own archive fails anew when the disk has refused
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    return write_whole(path, save, overwrite=overwrite)


def write_whole(path: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Any file by ``write``, which gets the path of a temporary one; otherwise as write_safetensors."""
    path = Path(path)
    refuse_taken(path, overwrite=overwrite)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.stem[:40]}.{uuid.uuid4().hex}.partial"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # safetensors may have put a file of its own there, which only its owner can read.
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        in_use = isinstance(error, PermissionError) and path.exists()
        remedy = "close the program that uses the old file," if in_use else "free space"
        raise FormatError(
            f"{path.name} could not be saved in {path.parent} ({reason}); {remedy} or choose a writable folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_KOHYA_BASES = {"sd15": "sd_v1-5", "sd21": "sd_v2-1", "sdxl": "sdxl_base_v1-0"}


def describe(
    format_tag: str,
    *,
    family: str,
    method: str,
    title: str,
    tokens: Sequence[LearnedToken] = (),
    config: Mapping[str, Any] | None = None,
    kind: str = "lora",
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Metadata of a file we write: our own keys, modelspec 1.0.1 and the ``ss_*`` keys LoRA managers read.

    Args:
        format_tag: kind and version, such as ``lora/1``.
        family: name from models.families.
        tokens: the learned tokens, in the order of their rows.
        config: training settings, stored as JSON.
        kind: modelspec suffix, ``lora`` or ``textual-inversion``.
        extra: further entries, such as the workflow that made the file.
    """
    metadata = {
        FORMAT_KEY: format_tag,
        "personalize.family": family,
        "personalize.method": method,
        "personalize.tokens": json.dumps([asdict(token) for token in tokens]),
        "personalize.config": json.dumps(dict(config or {}), sort_keys=True, default=str),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES[family]}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "ss_base_model_version": _KOHYA_BASES[family],
        "ss_output_name": title,
    }
    if tokens:
        metadata["modelspec.trigger_phrase"] = ", ".join(token.trigger for token in tokens)
    return metadata | dict(extra or {})


def stored_layers_per_block(metadata: Mapping[str, str]) -> int:
    """What a LoRA file says under LAYERS_KEY; 2, as in every published SDXL, when it says nothing."""
    value = metadata.get(LAYERS_KEY, "2")
    if not re.fullmatch(r"[1-9]\d?", value):
        raise FormatError(
            f"the file's entry {LAYERS_KEY} is {value!r}, expected a small number; save or download the file again"
        )
    return int(value)


def stored_tokens(metadata: Mapping[str, str]) -> tuple[LearnedToken, ...]:
    """The learned tokens that ``describe`` wrote; empty for files of other tools."""
    try:
        return tuple(LearnedToken(**token) for token in json.loads(metadata.get("personalize.tokens", "[]")))
    except (ValueError, TypeError, ConfigError) as error:
        raise FormatError(
            f"the file's entry personalize.tokens is damaged ({error}); expected a list of trigger, initializer and "
            "rows, save or download the file again"
        ) from error
