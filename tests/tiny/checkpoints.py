"""Tiny single-file checkpoints in the layout of Stable Diffusion 1.5, 2.1 (v-prediction) and XL.

The files need nothing but torch to write, hold the key names of the published checkpoints, and follow
each family's own rules (8 heads in SD1.5, 64 channels a head in SD2.1, SDXL and in every text encoder),
so a loader can infer all sizes from the shapes. Weights are random, with two exceptions that keep the
pictures meaningful: the autoencoder passes blurred colours through, and the UNet's output leans towards
its own input, so that sampling ends near the scale of real latents.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 49408
POSITIONS = 77
LATENT_CHANNELS = 4
VAE_WIDTH = 64
LATENT_COLOUR_SCALE = 3.0  # a colour range of 1 becomes a latent range of 3: about unit standard deviation


@dataclass(frozen=True)
class TextEncoder:
    """One CLIP text encoder: `key` as in learned-token files, `prefix` of its names in the checkpoint."""

    key: str
    width: int
    prefix: str
    openclip_names: bool
    layers: int = 3


@dataclass(frozen=True)
class TinyFamily:
    """Sizes of one tiny model; `depths` is the number of transformer blocks at each level of the UNet."""

    name: str
    kind: str
    """Whose key names and conventions it follows: "sd15", "sd21" or "sdxl"."""
    channels: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    text_encoders: tuple[TextEncoder, ...]
    linear_projections: bool
    v_prediction: bool
    latent_scale: float
    residual_blocks: int = 2
    """Residual blocks at each level of the UNet's way down."""

    @property
    def context_width(self) -> int:
        return sum(encoder.width for encoder in self.text_encoders)

    @property
    def vector_width(self) -> int | None:
        """Width of SDXL's extra conditioning: the pooled text and six embedded sizes of 256 channels."""
        return self.text_encoders[-1].width + 6 * 256 if self.kind == "sdxl" else None


FAMILIES = {
    family.name: family
    for family in (
        TinyFamily(
            name="sd15",
            kind="sd15",
            channels=32,
            multipliers=(1, 2),
            depths=(1, 0),
            middle_depth=1,
            text_encoders=(TextEncoder("clip_l", 64, "cond_stage_model.transformer.text_model.", False),),
            linear_projections=False,
            v_prediction=False,
            latent_scale=0.18215,
        ),
        TinyFamily(
            name="sd21",
            kind="sd21",
            channels=64,
            multipliers=(1, 2),
            depths=(1, 0),
            middle_depth=1,
            text_encoders=(TextEncoder("clip_h", 128, "cond_stage_model.model.", True),),
            linear_projections=True,
            v_prediction=True,
            latent_scale=0.18215,
        ),
        TinyFamily(
            name="sdxl",
            kind="sdxl",
            channels=32,
            multipliers=(1, 2, 4),
            depths=(0, 1, 2),
            middle_depth=2,
            text_encoders=(
                TextEncoder("clip_l", 64, "conditioner.embedders.0.transformer.text_model.", False),
                TextEncoder("clip_g", 128, "conditioner.embedders.1.model.", True),
            ),
            linear_projections=True,
            v_prediction=False,
            latent_scale=0.13025,
        ),
        # The two whose weights are trained on the small world; see tests/world.
        TinyFamily(
            name="world_sd15",
            kind="sd15",
            channels=64,
            multipliers=(1, 2),
            depths=(1, 1),
            middle_depth=1,
            text_encoders=(TextEncoder("clip_l", 64, "cond_stage_model.transformer.text_model.", False, layers=2),),
            linear_projections=False,
            v_prediction=False,
            latent_scale=0.18215,
            residual_blocks=1,
        ),
        TinyFamily(
            name="world_sdxl",
            kind="sdxl",
            channels=64,
            multipliers=(1, 2),
            depths=(1, 1),
            middle_depth=1,
            text_encoders=(
                TextEncoder("clip_l", 64, "conditioner.embedders.0.transformer.text_model.", False),
                TextEncoder("clip_g", 32, "conditioner.embedders.1.model.", True),
            ),
            linear_projections=True,
            v_prediction=False,
            latent_scale=0.13025,
            residual_blocks=1,
        ),
    )
}


def write_tiny_checkpoint(family: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Write a whole tiny checkpoint (UNet, autoencoder, text encoders) and return its path.

    The same family, seed and dtype give the same bytes; the file appears complete or not at all.

    Args:
        family: a name in FAMILIES.
        path: where the .safetensors file goes; the folder is made.
        seed: another seed is another model.
        dtype: of the stored weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tiny_state_dict(family, seed).items()}
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, path)
    return path


def tiny_state_dict(family: str, seed: int = 0) -> dict[str, Tensor]:
    """All weights of a tiny checkpoint in float32, under the names of the published single files."""
    sizes = FAMILIES[family]
    tensors = {f"model.diffusion_model.{name}": value for name, value in _unet(sizes, seed).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in _autoencoder(sizes, seed).items()}
    for encoder in sizes.text_encoders:
        tensors |= {encoder.prefix + name: value for name, value in _text_encoder(encoder, seed).items()}
    if sizes.v_prediction:
        tensors["v_pred"] = torch.zeros(0)
    return tensors


class _Weights(dict[str, Tensor]):
    """Random weights by name: each has its own generator, so adding one never changes another."""

    def __init__(self, seed: str):
        super().__init__()
        self.seed = seed

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        self[name] = torch.randn(shape, generator=generator) * std + mean

    def linear(self, name: str, inputs: int, outputs: int, gain: float = 1.0, bias: bool = True) -> None:
        self.normal(f"{name}.weight", (outputs, inputs), gain / math.sqrt(inputs))
        if bias:
            self.normal(f"{name}.bias", (outputs,), 0.05)

    def conv(self, name: str, inputs: int, outputs: int, size: int = 3, gain: float = 1.0, bias: bool = True) -> None:
        self.normal(f"{name}.weight", (outputs, inputs, size, size), gain / math.sqrt(inputs * size * size))
        if bias:
            self.normal(f"{name}.bias", (outputs,), 0.05)

    def norm(self, name: str, width: int) -> None:
        self.normal(f"{name}.weight", (width,), 0.1, mean=1.0)
        self.normal(f"{name}.bias", (width,), 0.1)


def _unet(sizes: TinyFamily, seed: int) -> dict[str, Tensor]:
    """The UNet under the names of the original latent diffusion code."""
    weights = _Weights(f"{sizes.name}/{seed}/unet")
    base, embedding = sizes.channels, 4 * sizes.channels

    def residual(name: str, inputs: int, outputs: int) -> None:
        weights.norm(f"{name}.in_layers.0", inputs)
        weights.conv(f"{name}.in_layers.2", inputs, outputs)
        weights.linear(f"{name}.emb_layers.1", embedding, outputs)
        weights.norm(f"{name}.out_layers.0", outputs)
        weights.conv(f"{name}.out_layers.3", outputs, outputs)
        if inputs != outputs:
            weights.conv(f"{name}.skip_connection", inputs, outputs, size=1)

    def transformer(name: str, width: int, depth: int) -> None:
        def project(part: str) -> None:
            if sizes.linear_projections:
                weights.linear(f"{name}.{part}", width, width)
            else:
                weights.conv(f"{name}.{part}", width, width, size=1)

        weights.norm(f"{name}.norm", width)
        project("proj_in")
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            for attention, context in (("attn1", width), ("attn2", sizes.context_width)):
                weights.linear(f"{block}.{attention}.to_q", width, width, bias=False)
                weights.linear(f"{block}.{attention}.to_k", context, width, bias=False)
                weights.linear(f"{block}.{attention}.to_v", context, width, bias=False)
                weights.linear(f"{block}.{attention}.to_out.0", width, width)
            weights.linear(f"{block}.ff.net.0.proj", width, 8 * width)
            weights.linear(f"{block}.ff.net.2", 4 * width, width)
            for norm in ("norm1", "norm2", "norm3"):
                weights.norm(f"{block}.{norm}", width)
        project("proj_out")

    weights.linear("time_embed.0", base, embedding)
    weights.linear("time_embed.2", embedding, embedding)
    if sizes.vector_width is not None:
        weights.linear("label_emb.0.0", sizes.vector_width, embedding)
        weights.linear("label_emb.0.2", embedding, embedding)

    weights.conv("input_blocks.0.0", LATENT_CHANNELS, base)
    skips, width, block = [base], base, 1
    for level, (multiplier, depth) in enumerate(zip(sizes.multipliers, sizes.depths, strict=True)):
        for _ in range(sizes.residual_blocks):
            residual(f"input_blocks.{block}.0", width, base * multiplier)
            width = base * multiplier
            if depth:
                transformer(f"input_blocks.{block}.1", width, depth)
            skips.append(width)
            block += 1
        if level < len(sizes.multipliers) - 1:
            weights.conv(f"input_blocks.{block}.0.op", width, width)
            skips.append(width)
            block += 1

    residual("middle_block.0", width, width)
    transformer("middle_block.1", width, sizes.middle_depth)
    residual("middle_block.2", width, width)

    block = 0
    for level in reversed(range(len(sizes.multipliers))):
        for index in range(sizes.residual_blocks + 1):
            residual(f"output_blocks.{block}.0", width + skips.pop(), base * sizes.multipliers[level])
            width = base * sizes.multipliers[level]
            if sizes.depths[level]:
                transformer(f"output_blocks.{block}.1", width, sizes.depths[level])
            if level > 0 and index == sizes.residual_blocks:
                weights.conv(f"output_blocks.{block}.{2 if sizes.depths[level] else 1}.conv", width, width)
            block += 1

    weights.norm("out.0", base)
    weights.conv("out.2", base, LATENT_CHANNELS, gain=0.35)
    _lean_towards_input(weights, last_block=f"output_blocks.{block - 1}")
    return weights


def _lean_towards_input(weights: _Weights, last_block: str) -> None:
    """Lead the input through the outermost skip connection, as x and -x, since silu(x) - silu(-x) = x."""
    first, last = weights["input_blocks.0.0.weight"], weights["out.2.weight"]
    skip = weights[f"{last_block}.0.skip_connection.weight"]
    offset = skip.shape[1] - first.shape[0]  # the skipped channels come after the ones from below
    # A constant part would add up over the steps of sampling to a wash of one colour.
    last -= last.mean(dim=(1, 2, 3), keepdim=True)
    weights["out.2.bias"] *= 0.1
    weights["out.0.weight"][: 2 * LATENT_CHANNELS] = 1.0
    weights["out.0.bias"][: 2 * LATENT_CHANNELS] *= 0.1
    for channel in range(LATENT_CHANNELS):
        for copy, sign in ((2 * channel, 1.0), (2 * channel + 1, -1.0)):
            first[copy] *= 0.1
            first[copy, channel, 1, 1] += sign
            skip[copy, offset + copy] += 8.0
            last[channel, copy, 1, 1] += sign * 0.9


def _text_encoder(encoder: TextEncoder, seed: int) -> dict[str, Tensor]:
    """One CLIP text encoder under the names of transformers or, for the OpenCLIP ones, of open_clip."""
    weights = _Weights(f"{encoder.key}/{seed}/text")
    width = encoder.width
    names = {
        "token": "token_embedding" if encoder.openclip_names else "embeddings.token_embedding",
        "position": "positional_embedding" if encoder.openclip_names else "embeddings.position_embedding.weight",
        "layer": "transformer.resblocks" if encoder.openclip_names else "encoder.layers",
        "norm": ("ln_1", "ln_2") if encoder.openclip_names else ("layer_norm1", "layer_norm2"),
        "mlp": ("mlp.c_fc", "mlp.c_proj") if encoder.openclip_names else ("mlp.fc1", "mlp.fc2"),
        "final": "ln_final" if encoder.openclip_names else "final_layer_norm",
    }
    weights.normal(f"{names['token']}.weight", (VOCABULARY, width), 0.05)
    weights.normal(names["position"], (POSITIONS, width), 0.02)
    for index in range(encoder.layers):
        layer = f"{names['layer']}.{index}"
        for norm in names["norm"]:
            weights.norm(f"{layer}.{norm}", width)
        if encoder.openclip_names:
            weights.normal(f"{layer}.attn.in_proj_weight", (3 * width, width), 1 / math.sqrt(width))
            weights.normal(f"{layer}.attn.in_proj_bias", (3 * width,), 0.05)
            weights.linear(f"{layer}.attn.out_proj", width, width)
        else:
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                weights.linear(f"{layer}.self_attn.{projection}", width, width)
        weights.linear(f"{layer}.{names['mlp'][0]}", width, 4 * width)
        weights.linear(f"{layer}.{names['mlp'][1]}", 4 * width, width)
    weights.norm(names["final"], width)
    if encoder.openclip_names:
        weights.normal("text_projection", (width, width), 1 / math.sqrt(width))
        weights["logit_scale"] = torch.tensor(4.6055)
    return weights


def _autoencoder(sizes: TinyFamily, seed: int) -> dict[str, Tensor]:
    """A TAESD (github.com/madebyollin/taesd) that averages colours over 8 x 8 pixels, plus some noise.

    Its own latents are scaled ones; `vae_scale` turns them into the unscaled latents that callers expect.
    """
    weights = _Weights(f"{sizes.name}/{seed}/vae")
    encoder, decoder = "taesd_encoder", "taesd_decoder"
    for name, blocks in ((encoder, (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)), (decoder, (3, 4, 5, 8, 9, 10, 13, 14, 15, 18))):
        for block in blocks:
            for part, gain in ((0, 1.0), (2, 1.0), (4, 0.02)):
                weights.conv(f"{name}.{block}.conv.{part}", VAE_WIDTH, VAE_WIDTH, gain=gain)
            weights[f"{name}.{block}.conv.4.bias"] *= 0.1

    weights.conv(f"{encoder}.0", 3, VAE_WIDTH)
    _pass_colours(weights[f"{encoder}.0.weight"], weights[f"{encoder}.0.bias"])
    for downsample in (2, 6, 10):
        weights.conv(f"{encoder}.{downsample}", VAE_WIDTH, VAE_WIDTH, bias=False)
        _pass_colours(weights[f"{encoder}.{downsample}.weight"], average=True)
    weights.conv(f"{encoder}.14", VAE_WIDTH, LATENT_CHANNELS)
    _pass_colours(weights[f"{encoder}.14.weight"], weights[f"{encoder}.14.bias"], gain=LATENT_COLOUR_SCALE, shift=-0.5)

    weights.conv(f"{decoder}.1", LATENT_CHANNELS, VAE_WIDTH)
    _pass_colours(weights[f"{decoder}.1.weight"], weights[f"{decoder}.1.bias"], gain=1 / LATENT_COLOUR_SCALE)
    weights[f"{decoder}.1.bias"][:3] = 0.5
    for upsample in (7, 12, 17):
        weights.conv(f"{decoder}.{upsample}", VAE_WIDTH, VAE_WIDTH, bias=False)
        _pass_colours(weights[f"{decoder}.{upsample}.weight"])
    weights.conv(f"{decoder}.19", VAE_WIDTH, 3)
    _pass_colours(weights[f"{decoder}.19.weight"], weights[f"{decoder}.19.bias"])

    weights["vae_scale"] = torch.tensor(sizes.latent_scale)
    weights["vae_shift"] = torch.tensor(0.0)
    return weights


def _pass_colours(
    weight: Tensor, bias: Tensor | None = None, *, gain: float = 1.0, shift: float = 0.0, average: bool = False
) -> None:
    """Make the first three outputs carry the first three inputs, `gain` times (input + `shift`), nearly noiseless.

    With `average` they carry the mean over 2 x 2 pixels, for a convolution of stride 2 and padding 1.
    """
    weight[:3] *= 0.02
    for colour in range(3):
        if average:
            weight[colour, colour, 1:, 1:] += gain / 4
        else:
            weight[colour, colour, 1, 1] += gain
    if bias is not None:
        bias[:3] *= 0.1
        bias[:3] += gain * shift
