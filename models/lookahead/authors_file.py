"""The authors' model_ckpt.pt: which of its tensors training changed, under the names of the slim file.

It is the state dict of everything (OrLichter/lcm-lookahead, train_encoder.py's save hook): SDXL's UNet, CLIP-Vision,
the resampler, and in each transformer block two KVCopy modules, extract_kv1 and extract_kv2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from .encoder_parts import BLOCK, check_low_rank_pair

MARK = ".extract_kv2."
"""Part of some name in every such file, and in no other."""

_LEAF = re.compile(rf"({BLOCK})\.(extract_kv[12]\..+|attn[12]\..+\.lora_layer\..+)")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_KEYS_AND_VALUES = ("to_k", "to_v")
_ADAPTER = {f"extract_kv2.{which}.weight": f"{which}.weight" for which in _KEYS_AND_VALUES}
_COPIES = {f"extract_kv1.{which}.weight": f"{which}.weight" for which in _KEYS_AND_VALUES}
_COPIES_LORA = {
    f"extract_kv1.{which}.lora_layer.{half}.weight": f"{which}.{half}"
    for which in _KEYS_AND_VALUES
    for half in ("down", "up")
}
_LORA = {
    f"attn{number}.{which}.lora_layer.{half}.weight": f"attn{number}.{which}.{half}"
    for number in (1, 2)
    for which in _PROJECTIONS
    for half in ("down", "up")
}


@dataclass(frozen=True)
class AuthorsCheckpoint:
    """The tensors by what they are; still in the file, if they were mapped."""

    resampler: dict[str, Tensor]
    blocks: dict[str, dict[str, Tensor]]
    """Transformer block -> what the encoder adds to it, by the authors' names."""
    base: dict[str, Tensor]
    """The frozen UNet, by diffusers' names."""
    vision_parameters: int
    """Size of the frozen CLIP-Vision model."""
    name: str

    def trained(self) -> dict[str, Tensor]:
        """All but the copies, by the slim file's names."""
        tensors = {f"resampler.{key}": tensor for key, tensor in self.resampler.items()}
        for part, names in (("adapter", _ADAPTER), ("lora", _LORA)):
            for block, leaves in self.blocks.items():
                tensors |= {f"{part}.{block}.{names[leaf]}": leaves[leaf] for leaf in names if leaf in leaves}
        return tensors

    def frozen_parameters(self) -> int:
        """How many numbers training left as they were: the UNet's, its copies' and CLIP-Vision's."""
        copied = [leaves[leaf] for leaves in self.blocks.values() for leaf in _COPIES]
        return self.vision_parameters + sum(tensor.numel() for tensor in [*self.base.values(), *copied])

    def copies(self, block: str) -> dict[str, Tensor]:
        """One block's copies, by the slim file's names; none when they are self-attention's own projections.

        A copy with a LoRA started as attn1's weight and was frozen there. Where that proves to be so, the LoRA alone
        is kept; where not, or without a LoRA, the full weight is, with its LoRA added.
        """
        leaves = self.blocks[block]
        weights = {kept: leaves[leaf] for leaf, kept in _COPIES.items()}
        low_rank = {kept: leaves[leaf] for leaf, kept in _COPIES_LORA.items() if leaf in leaves}
        if all(deviation(weight, self.base[f"{block}.attn1.{kept}"])[1] for kept, weight in weights.items()):
            return {f"copies.{block}.{kept}": tensor for kept, tensor in low_rank.items()}
        if low_rank:
            for which in _KEYS_AND_VALUES:
                down, up = low_rank[f"{which}.down"], low_rank[f"{which}.up"]
                check_low_rank_pair(down, up, f"{block}.extract_kv1.{which}", self.name)
                weight = weights[f"{which}.weight"]
                weights[f"{which}.weight"] = (weight.float() + up.float() @ down.float()).to(weight.dtype)
        return {f"copies.{block}.{kept}": tensor for kept, tensor in weights.items()}


def sort_checkpoint(tensors: Mapping[str, Tensor], name: str) -> AuthorsCheckpoint:
    """Sort the tensors without touching their values.

    Raises:
        FormatError: some are unknown, missing or misshapen; the authors' own loading is strict, too.
    """
    resampler: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    base: dict[str, Tensor] = {}
    vision = 0
    for key, tensor in tensors.items():
        root, _, rest = key.removeprefix("module.").partition(".")  # a training on several GPUs adds the prefix
        if root == "image_encoder":
            vision += tensor.numel()
        elif root == "image_proj_model":
            resampler[rest] = tensor
        elif ".source_attention_block." in rest:
            continue  # attn1 and attn2 again, in the same storage
        elif match := _LEAF.fullmatch(rest):
            blocks.setdefault(match[1], {})[match[2]] = tensor
        elif root == "encoder_unet" and "extract_kv" not in rest and "lora_layer" not in rest:
            base[rest] = tensor
        else:
            raise FormatError(f"{name}: {key} is unknown; expected the authors' model_ckpt.pt, choose another file")
    for key, tensor in base.items():
        if not tensor.is_floating_point() or not tensor.numel():
            raise FormatError(
                f"{name}: encoder_unet.{key} is {tuple(tensor.shape)} of {tensor.dtype}, expected floating point; the "
                "file is damaged, download it again"
            )
    transformers = {key.removesuffix(".attn1.to_k.weight") for key in base if key.endswith(".attn1.to_k.weight")}
    for block in sorted(transformers | blocks.keys()):
        _check_block(block, blocks.get(block, {}), base, name)
    return AuthorsCheckpoint(resampler, blocks, base, vision, name)


def _check_block(block: str, leaves: Mapping[str, Tensor], base: Mapping[str, Tensor], name: str) -> None:
    """FormatError unless the block has what the authors' class gives it, with all of each LoRA or nothing of it."""
    wanted = _ADAPTER.keys() | _COPIES.keys()
    for optional in (_COPIES_LORA, _LORA):
        wanted |= optional.keys() if leaves.keys() & optional.keys() else set()
    attention = {f"attn{number}.{which}.weight" for number in (1, 2) for which in _PROJECTIONS}
    missing = (wanted - leaves.keys()) | {leaf for leaf in attention if f"{block}.{leaf}" not in base}
    unknown = leaves.keys() - wanted
    if missing or unknown:
        problem = f"lacks {min(missing)}" if missing else f"has {min(unknown)}, which is unknown"
        raise FormatError(f"{name}: {block} {problem}; expected a complete model_ckpt.pt, download it again")
    shapes = {leaf: tuple(base[f"{block}.{leaf}"].shape) for leaf in attention}
    for leaf, tensor in leaves.items():
        # A copy has the shape of what it copies, and a LoRA's product that of the weight beside it.
        module, _, half = leaf.replace("extract_kv", "attn").removesuffix(".weight").partition(".lora_layer.")
        shape = shapes[f"{module}.weight"]
        rank = tensor.shape[0 if half == "down" else 1] if tensor.ndim == 2 else 1
        expected = {"": shape, "down": (rank, *shape[1:]), "up": (*shape[:1], rank)}[half]
        if tuple(tensor.shape) != expected:
            raise FormatError(
                f"{name}: {block}.{leaf} is {tuple(tensor.shape)}, expected {expected}; the file is damaged, download "
                "it again"
            )


def deviation(found: Tensor, expected: Tensor) -> tuple[float, bool]:
    """Largest absolute difference, and whether all are within what the coarser of the two dtypes rounds."""
    if found.dtype == expected.dtype and torch.equal(found, expected):
        return 0.0, True
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (found, expected))
    least = max(torch.finfo(tensor.dtype).smallest_normal for tensor in (found, expected)) * eps
    expected = expected.float()
    difference = (found.float() - expected).abs()
    return difference.nan_to_num(torch.inf).max().item(), bool((difference <= eps * expected.abs() + least).all())
