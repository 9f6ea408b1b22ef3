"""The encoder that a training starts from: an IP-Adapter file given what is to be learned, or an earlier encoder."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.lookahead.encoder import LookaheadEncoder, read_encoder
from ...models.lookahead.encoder_parts import last_block
from ...models.lora import LowRankDelta

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def start_encoder(
    path: Path, unet: nn.Module, *, lora_rank: int, copy_rank: int, generator: torch.Generator
) -> LookaheadEncoder:
    """Read the file, and add to an untrained one LoRAs that change nothing yet.

    Down-projections are drawn from a normal distribution of standard deviation 1/rank, up-projections are zero, as in
    the authors' model/encoder_unet.py. A trained encoder keeps the ranks that it has.

    Args:
        copy_rank: 0 gives copies of keys' and values' full weights.

    Raises as read_encoder, and IncompatibleModelError where the file is for another UNet.
    """
    suffix = ".attn1.to_k"
    blocks = [name.removesuffix(suffix) for name, _ in unet.named_modules() if name.endswith(suffix)]
    encoder = read_encoder(path, blocks)
    encoder.check_fit({name.removesuffix(".weight"): value.shape for name, value in unet.state_dict().items()})
    if encoder.trained:
        return encoder

    def weight(name: str) -> Tensor:
        return unet.get_submodule(name).weight

    def delta(name: str, rank: int) -> LowRankDelta:
        outputs, inputs = weight(name).shape
        down = torch.randn(rank, inputs, generator=generator) / rank
        return LowRankDelta(down, torch.zeros(outputs, rank))

    lora, copies = {}, {}
    last = last_block(dict.fromkeys(blocks))
    for block in blocks:
        if lora_rank and block != last:
            names = [f"{block}.{attention}.{one}" for attention in ("attn1", "attn2") for one in PROJECTIONS]
            lora |= {name: delta(name, lora_rank) for name in names}
        keys, values = f"{block}.attn1.to_k", f"{block}.attn1.to_v"
        if copy_rank:
            copies[block] = delta(keys, copy_rank), delta(values, copy_rank)
        else:
            copies[block] = weight(keys).float().cpu().clone(), weight(values).float().cpu().clone()
    return replace(encoder, lora=lora, copies=copies)
