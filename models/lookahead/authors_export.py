"""An encoder as the authors' model_ckpt.pt, which their infer.py loads: the frozen UNet and image encoder lie in it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..formats import write_torch_file
from ..lora import LowRankDelta
from .encoder import LookaheadEncoder
from .encoder_parts import last_block

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_KEYS_AND_VALUES = ("to_k", "to_v")


def authors_ranks(encoder: LookaheadEncoder) -> tuple[int, int]:
    """Ranks of the LoRAs of the encoder's pass and of the copies, 0 where there are none.

    The authors' infer.py must be told both, and knows a single one for all layers: smaller ones are filled up with
    zeros.
    """
    copies = [copy for pair in encoder.copies.values() for copy in pair if isinstance(copy, LowRankDelta)]
    return tuple(max((delta.rank for delta in deltas), default=0) for deltas in (encoder.lora.values(), copies))


def authors_tensors(
    encoder: LookaheadEncoder, unet: Mapping[str, Tensor], vision: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict that their strict loading expects (OrLichter/lcm-lookahead, train_encoder.py's save hook).

    Attention is registered twice and more under other names there; the tensors of all names are the same objects, so
    that a file holds them once.

    Args:
        unet: the base's weights by diffusers' names.
        vision: the image encoder's by transformers' names.

    Raises:
        IncompatibleModelError: the encoder was made for another UNet.
    """
    encoder.check_fit({name.removesuffix(".weight"): tensor.shape for name, tensor in unet.items()})
    rank, copy_rank = authors_ranks(encoder)
    own = {name: _alone(tensor) for name, tensor in unet.items()}
    # Behind the last keys and values nothing is read, so their class has no LoRA there and one would change nothing.
    last = last_block(encoder.adapter)
    for block, (keys, values) in encoder.adapter.items():
        if rank and block != last:
            for module in (f"{block}.attn{number}.{which}" for number in (1, 2) for which in _PROJECTIONS):
                own |= _lora(module, encoder.lora.get(module), own[f"{module}.weight"], rank)
        for number in (1, 2):
            attention = f"{block}.attn{number}."
            again = f"{block}.extract_kv{number}.source_attention_block."
            own |= {again + name.removeprefix(attention): own[name] for name in list(own) if name.startswith(attention)}
        own |= {f"{block}.extract_kv2.to_k.weight": keys, f"{block}.extract_kv2.to_v.weight": values}
        for which, copy in zip(_KEYS_AND_VALUES, encoder.copies.get(block, (None, None)), strict=True):
            module, frozen = f"{block}.extract_kv1.{which}", own[f"{block}.attn1.{which}.weight"]
            own[f"{module}.weight"] = copy if isinstance(copy, Tensor) else frozen
            if copy_rank:
                own |= _lora(module, copy if isinstance(copy, LowRankDelta) else None, frozen, copy_rank)
    tensors = {f"encoder_unet.{name}": tensor for name, tensor in own.items()}
    tensors |= {f"image_encoder.{name}": _alone(tensor) for name, tensor in vision.items()}
    return tensors | {f"image_proj_model.{name}": value for name, value in encoder.resampler.state_dict().items()}


def write_authors_file(
    path: Path,
    encoder: LookaheadEncoder,
    unet: Mapping[str, Tensor],
    vision: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
) -> Path:
    """Write authors_tensors to a .pt file, complete or not at all; errors as there and as write_torch_file."""
    tensors = authors_tensors(encoder, unet, vision)
    return write_torch_file(path, {name: tensor.detach() for name, tensor in tensors.items()}, overwrite=overwrite)


def _lora(module: str, delta: LowRankDelta | None, weight: Tensor, rank: int) -> dict[str, Tensor]:
    """The LoRA beside a weight (out, in), or zeros, at this rank."""
    outputs, inputs = weight.shape
    dtype = torch.float32 if delta is None else delta.down.dtype
    down, up = weight.new_zeros(rank, inputs, dtype=dtype), weight.new_zeros(outputs, rank, dtype=dtype)
    if delta is not None:
        down[: delta.rank], up[:, : delta.rank] = delta.down, delta.up * delta.scale
    return {f"{module}.lora_layer.down.weight": down, f"{module}.lora_layer.up.weight": up}


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it is a part of something larger, all of which torch would write."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.contiguous().clone()
