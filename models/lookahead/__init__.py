"""LCM-Lookahead (arXiv 2404.03620): a face encoder for SDXL, trained through a one-step preview.

Identity reaches the model in two ways: tokens of the picture in cross-attention, as IP-Adapter Plus adds them, and the
picture's own keys and values, computed by an encoder pass of the same UNet and joined to self-attention. Guidance has a
scale for each. The encoder learns from losses on pictures, an identity loss on the aligned face above all, which a
consistency model previews in one step from any timestep.
"""

from .alignment import REFERENCE_POINTS, align_faces, crop, fit_similarity, transform_points, widened
from .guidance import Row, few_step_weights, guidance_weights, lookahead_guidance, plain_weights
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
from .preview import boundary_scalings, predict_original, preview
from .resampler import IdentityTokens, Resampler, encode_identity, join_pictures
from .timesteps import DENOISING_ALPHA, PREVIEW_ALPHA, draw_timesteps, importance

__all__ = [
    "DENOISING_ALPHA",
    "PREVIEW_ALPHA",
    "REFERENCE_POINTS",
    "IdentityTokens",
    "Resampler",
    "Row",
    "add_adapter",
    "align_faces",
    "append_or_repeat",
    "attention",
    "boundary_scalings",
    "crop",
    "draw_timesteps",
    "encode_identity",
    "few_step_weights",
    "fit_similarity",
    "for_batch",
    "guidance_weights",
    "importance",
    "join_pictures",
    "kept_tokens",
    "lookahead_guidance",
    "plain_weights",
    "predict_original",
    "preview",
    "region_tokens",
    "shared_attention",
    "sharing_weights",
    "transform_points",
    "widened",
]
