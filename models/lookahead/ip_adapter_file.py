"""ip-adapter-plus and ip-adapter-plus-face files, from which trainings of an encoder start."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import FormatError, IncompatibleModelError

MARK = "ip_adapter."
_LAYER = re.compile(r"ip_adapter\.(\d+)\.(to_[kv])_ip\.weight")

SDXL_BLOCKS = tuple(
    f"{part}.attentions.{attention}.transformer_blocks.{layer}"
    for part, attentions, layers in (
        ("down_blocks.1", 2, 2),
        ("down_blocks.2", 2, 10),
        ("up_blocks.0", 3, 10),
        ("up_blocks.1", 3, 2),
        ("mid_block", 1, 10),
    )
    for attention in range(attentions)
    for layer in range(layers)
)
"""SDXL's transformer blocks in the order of diffusers' modules, which is not the order of a forward pass."""


def slim_names(tensors: Mapping[str, Tensor], name: str, blocks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The tensors under the names of the slim encoder file.

    Such a file numbers the layers of self- and cross-attention through, so that the cross-attention of block i is
    layer 2i + 1; which block that is depends on the UNet.

    Args:
        blocks: the UNet's transformer blocks in the order of diffusers' modules; SDXL's when not given.

    Raises:
        FormatError: a tensor is of another kind of adapter, or layers are missing.
        IncompatibleModelError: the file is for a UNet with another number of blocks.
    """
    slim: dict[str, Tensor] = {}
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("image_proj."):
            slim["resampler." + key.removeprefix("image_proj.")] = tensor
        elif match := _LAYER.fullmatch(key):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        else:
            raise FormatError(
                f"{name}: {key} is not of an ip-adapter-plus file; choose an ip-adapter-plus or ip-adapter-plus-face "
                "file for SDXL, FaceID files are of another kind"
            )
    count = max(layers, default=0) // 2 + 1
    expected = range(1, 2 * count, 2)
    for number in sorted({*layers, *expected}):
        if number not in expected or len(layers.get(number, ())) != 2:
            raise FormatError(
                f"{name}: layer {number} of the adapter is incomplete; expected to_k_ip and to_v_ip of every odd "
                "number, download the file again"
            )
    blocks = SDXL_BLOCKS if blocks is None else blocks
    if len(blocks) != count:
        raise IncompatibleModelError(
            f"{name}: found an adapter for {count} transformer blocks, expected {len(blocks)}; choose an "
            "ip-adapter-plus or ip-adapter-plus-face file for SDXL"
        )
    for block, number in zip(blocks, sorted(layers)):
        slim |= {f"adapter.{block}.{which}.weight": tensor for which, tensor in layers[number].items()}
    return slim
