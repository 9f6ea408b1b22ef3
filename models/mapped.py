"""Weight files of many gigabytes: named tensors that stay in the file until they are touched."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FormatError
from .formats import read_header, read_torch_file


def map_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and metadata of a weight file of either kind, as read_weights, without reading the values.

    The tensors are views of the file; clone what is kept, so that the file can be closed and replaced. Names in nested
    dictionaries are joined by dots.
    """
    path = Path(path)
    if path.suffix.lower() not in {".safetensors", ".sft"}:
        contents = read_torch_file(path, mmap=True)
        return dict(_flattened(contents.get("state_dict", contents), path.name)), {}
    header = read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in header.shapes}, header.metadata
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name}: damaged safetensors file ({error}); download or copy it again") from error


def _flattened(contents: Mapping[str, Any], name: str, depth: int = 2) -> Iterator[tuple[str, Tensor]]:
    for key, value in contents.items():
        if isinstance(value, Mapping) and depth:
            yield from ((f"{key}.{inner}", tensor) for inner, tensor in _flattened(value, name, depth - 1))
        elif isinstance(value, Tensor):
            yield str(key), _plain(str(key), value.detach(), name)


def _plain(key: str, tensor: Tensor, name: str) -> Tensor:
    """The tensor, unless a copy of it would be larger than what the file holds, one number spread to gigabytes."""
    if tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized:
        if tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes():
            return tensor
    raise FormatError(
        f"{name}: {key} is no ordinary tensor of its own values; save the file again with plain tensors, "
        "or download it again"
    )
