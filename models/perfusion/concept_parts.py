"""The tensors of a concept, checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError

KEY = ".attn2.to_k"
"""How the names of key projections end; those of the values', VALUE."""
VALUE = ".attn2.to_v"
OUTPUT = "target_output."
_MODULE = re.compile(
    r"(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn2\.to_[kv]"
)


@dataclass(frozen=True)
class ConceptParts:
    """What a training leaves besides the word."""

    target_input: Tensor
    """i*, (dim,)."""
    dual: Tensor
    """C⁻¹ i*, (dim,)."""
    outputs: dict[str, Tensor]
    """Target output of each value projection, and of none or all key projections, by diffusers' module name:
    (1 or positions, out)."""
    superclass_input: Tensor | None
    """What key projections answer to where ``outputs`` has none, (1 or positions, dim)."""


def checked_parts(tensors: Mapping[str, Tensor], name: str) -> ConceptParts:
    """Sort a file's tensors, as float32 copies.

    Args:
        name: of the file, for messages.

    Raises:
        FormatError: a tensor is unknown, missing, misshapen or not finite.
    """
    tensors = {key: _sound(key, tensor, name) for key, tensor in tensors.items()}
    outputs = {key[len(OUTPUT) :]: tensors.pop(key) for key in list(tensors) if key.startswith(OUTPUT)}
    unknown = {module for module in outputs if not _MODULE.fullmatch(module)}
    unknown |= tensors.keys() - {"target_input", "target_input_dual", "superclass_input"}
    if unknown:
        raise FormatError(
            f"{name}: {min(unknown)} is no part of a concept for Stable Diffusion; download the file again, or update "
            "the extension"
        )
    values, keys = ({module[: -len(end)] for module in outputs if module.endswith(end)} for end in (VALUE, KEY))
    target, dual = tensors.get("target_input"), tensors.get("target_input_dual")
    superclass = None if keys else tensors.get("superclass_input")
    if target is None or dual is None or not values or (superclass is None and keys != values):
        raise FormatError(
            f"{name}: holds {', '.join(sorted(tensors)) or 'no input'} and target outputs of {len(values)} value and "
            f"{len(keys)} key projections; the concept is incomplete, download it again"
        )
    for key, tensor, right in [
        ("target_input", target, target.ndim == 1),
        ("target_input_dual", dual, dual.shape == target.shape),
        ("superclass_input", superclass, superclass is None or superclass.shape[1:] == target.shape),
        *((module, rows, rows.ndim == 2) for module, rows in outputs.items()),
    ]:
        if not right or (tensor is not None and not tensor.numel()):
            raise FormatError(
                f"{name}: {key} has the shape {tuple(tensor.shape)}, which no concept has; the file is damaged, "
                "download it again"
            )
    if not target.double() @ dual.double() > 0:
        raise FormatError(
            f"{name}: the target input has no positive energy in its covariance; the file is damaged, train it again"
        )
    return ConceptParts(target, dual, outputs, superclass)


def _sound(key: str, tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise FormatError(f"{name}: {key} is {tensor.dtype}, expected 16-bit or 32-bit floats; convert it again")
    if not tensor.isfinite().all():
        raise FormatError(f"{name}: {key} holds values that are no numbers; the training failed, train it again")
    return tensor.detach().to(torch.float32, copy=True)
