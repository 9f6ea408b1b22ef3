"""The tensors of a slim encoder file, checked, copied and sorted into the encoder's parts."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError
from ..lora import LowRankDelta
from .resampler import Resampler

KeyValueCopy = LowRankDelta | Tensor | None
"""A change of self-attention's own projection, a full weight (heads * dim, channels), or that projection unchanged."""

BLOCK = r"(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
_NAMES = {
    "adapter": re.compile(rf"adapter\.({BLOCK}\.to_[kv])\.(weight)"),
    "lora": re.compile(rf"lora\.({BLOCK}\.attn[12]\.to_(?:q|k|v|out\.0))\.(down|up)"),
    "copies": re.compile(rf"copies\.({BLOCK}\.to_[kv])\.(down|up|weight)"),
}


class Parts(NamedTuple):
    """Fields of LookaheadEncoder of the same names."""

    resampler: Resampler
    adapter: dict[str, tuple[Tensor, Tensor]]
    lora: dict[str, LowRankDelta]
    copies: dict[str, tuple[KeyValueCopy, KeyValueCopy]]


def read_parts(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None) -> Parts:
    """Sort copies of a slim file's tensors, in ``dtype`` or their own.

    Raises:
        FormatError: a tensor is unknown, missing, misshapen or not finite.
    """
    leaves: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in _NAMES}
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        part = key.partition(".")[0]
        if part == "resampler":
            own[key] = _sound(key, tensor, name, dtype)
        elif part in _NAMES and (match := _NAMES[part].fullmatch(key)):
            module, leaf = match.groups()
            leaves[part].setdefault(module, {})[leaf] = _sound(key, tensor, name, dtype)
        else:
            raise FormatError(f"{name}: {key} is no part of an encoder; update the extension, or download it again")
    try:
        resampler = Resampler.from_tensors(own, prefix="resampler.").requires_grad_(False)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    adapter = _pairs({module: found["weight"] for module, found in leaves["adapter"].items()}, name)
    lora = {module: _delta(found, f"lora.{module}", name) for module, found in leaves["lora"].items()}
    copies = _pairs(
        {module: _copy(found, f"copies.{module}", name) for module, found in leaves["copies"].items()}, name
    )
    blocks = {module.rsplit(".attn", 1)[0] for module in lora} | copies.keys()
    if not adapter or not blocks <= adapter.keys():
        raise FormatError(
            f"{name}: {len(blocks - adapter.keys())} transformer blocks{example(blocks - adapter.keys())}, have no "
            f"adapter, beside {len(adapter)} that do; the file is incomplete, download it again"
        )
    _check_shapes(adapter, copies, resampler.proj_out.out_features, name)
    return Parts(resampler, adapter, lora, {block: copies.get(block, (None, None)) for block in adapter})


def example(names: Iterable[str]) -> str:
    """``, such as <the first>``, or nothing."""
    first = min(names, default=None)
    return "" if first is None else f", such as {first}"


def last_block(blocks: Mapping[str, object]) -> str:
    """The transformer block that a UNet comes to last."""
    return max(blocks, key=_place)


def matrix_shape(weight: LowRankDelta | Tensor) -> tuple[int, ...]:
    """(out, in) of a weight or of its low-rank change."""
    if isinstance(weight, LowRankDelta):
        return weight.up.shape[0], weight.down.shape[1]
    return tuple(weight.shape)


def check_low_rank_pair(down: Tensor, up: Tensor, module: str, name: str) -> None:
    """Raise FormatError unless the two can be multiplied, up (out, rank) by down (rank, in)."""
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.numel() or not up.numel():
        raise FormatError(
            f"{name}: the LoRA of {module} has matrices of {tuple(down.shape)} and {tuple(up.shape)}, expected (rank, "
            "in) and (out, rank); the file is damaged, download it again"
        )


def _sound(key: str, tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """A copy of the tensor; FormatError when it has values that no training leaves behind."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise FormatError(f"{name}: {key} is {_dtype(tensor)}, expected 16-bit or 32-bit floating point; convert again")
    if not tensor.isfinite().all():
        raise FormatError(f"{name}: {key} has values that are no numbers; the training failed, choose another file")
    return tensor.detach().to(dtype or tensor.dtype, copy=True)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pairs(found: Mapping[str, KeyValueCopy], name: str) -> dict[str, tuple[KeyValueCopy, KeyValueCopy]]:
    """``<block>.to_k`` and ``<block>.to_v`` -> block -> both."""
    blocks = dict.fromkeys(module.rsplit(".", 1)[0] for module in found)
    for block in blocks:
        for has, lacks in (("to_k", "to_v"), ("to_v", "to_k")):
            if f"{block}.{lacks}" not in found:
                raise FormatError(
                    f"{name}: {block} has {has} without {lacks}; the file is incomplete, download it again"
                )
    return {block: (found[f"{block}.to_k"], found[f"{block}.to_v"]) for block in blocks}


def _delta(leaves: Mapping[str, Tensor], module: str, name: str) -> LowRankDelta:
    if leaves.keys() != {"down", "up"}:
        raise FormatError(
            f"{name}: {module} has {' and '.join(sorted(leaves))}, expected down and up; the file is incomplete, "
            "download it again"
        )
    check_low_rank_pair(leaves["down"], leaves["up"], module, name)
    return LowRankDelta(leaves["down"], leaves["up"])


def _copy(leaves: Mapping[str, Tensor], module: str, name: str) -> KeyValueCopy:
    return leaves["weight"] if leaves.keys() == {"weight"} else _delta(leaves, module, name)


def _check_shapes(adapter, copies, width: int, name: str) -> None:
    for block, (k, v) in adapter.items():
        if k.ndim != 2 or k.shape != v.shape or k.shape[1] != width or not k.numel():
            raise FormatError(
                f"{name}: the adapter of {block} has keys of {tuple(k.shape)} and values of {tuple(v.shape)}, expected "
                f"two matrices for tokens of {width} numbers; the file is damaged, download it again"
            )
        shapes = {matrix_shape(copy) for copy in copies.get(block, ())}
        if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != k.shape[0] for shape in shapes):
            raise FormatError(
                f"{name}: the copies of {block} make keys and values of {sorted(shapes)}, expected {k.shape[0]} rows "
                "of both; the file is damaged, download it again"
            )


def _place(block: str) -> tuple[int, ...]:
    numbers = [int(part) for part in block.split(".") if part.isdigit()]
    stage = ("down_blocks", "mid_block", "up_blocks").index(block.split(".")[0])
    return (stage, *numbers) if stage != 1 else (stage, 0, *numbers)
