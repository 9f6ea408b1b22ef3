"""LCM-Lookahead (arXiv 2404.03620): a face encoder for SDXL, trained through a one-step preview.

Identity reaches the model in two ways: tokens of the picture in cross-attention, as IP-Adapter Plus adds them, and the
picture's own keys and values, computed by an encoder pass of the same UNet and joined to self-attention. Guidance has a
scale for each. The encoder learns from losses on pictures, an identity loss on the aligned face above all, which a
consistency model previews in one step from any timestep.
"""

from .guidance import Row, few_step_weights, guidance_weights, lookahead_guidance, plain_weights, rescale_to_text
from .injection import (
    add_adapter,
    append_or_repeat,
    attention,
    for_batch,
    kept_tokens,
    region_tokens,
    shared_attention,
    sharing_weights,
)
from .resampler import IdentityTokens, Resampler, encode_identity, join_pictures

__all__ = [
    "IdentityTokens",
    "Resampler",
    "Row",
    "add_adapter",
    "append_or_repeat",
    "attention",
    "encode_identity",
    "few_step_weights",
    "for_batch",
    "guidance_weights",
    "join_pictures",
    "kept_tokens",
    "lookahead_guidance",
    "plain_weights",
    "region_tokens",
    "rescale_to_text",
    "shared_attention",
    "sharing_weights",
]
