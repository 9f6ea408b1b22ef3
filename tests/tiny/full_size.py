"""Names and shapes of the published single-file checkpoints, and files that hold them without taking space."""

from __future__ import annotations

import dataclasses
import json
import struct

import torch

# Channels, multipliers and depths of the three UNets, and (width, layers) of their text encoders.
PUBLISHED = {
    "sd15": ((320, (1, 2, 4, 4), (1, 1, 1, 0), 1), {"clip_l": (768, 12)}),
    "sd21": ((320, (1, 2, 4, 4), (1, 1, 1, 0), 1), {"clip_h": (1024, 24)}),
    "sdxl": ((320, (1, 2, 4), (0, 2, 10), 10), {"clip_l": (768, 12), "clip_g": (1280, 32)}),
}


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """The KL autoencoder of all three families in its original names."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, size: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(half: str) -> None:
        residual(f"{half}.mid.block_1", 512, 512)
        norm(f"{half}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{part}", 512, 512, 1)
        residual(f"{half}.mid.block_2", 512, 512)
        norm(f"{half}.norm_out", 512 if half == "encoder" else 128)

    widths = (128, 256, 512, 512)
    conv("encoder.conv_in", 3, 128)
    width = 128
    for level, wider in enumerate(widths):
        for block in range(2):
            residual(f"encoder.down.{level}.block.{block}", width, wider)
            width = wider
        if level < 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder")
    conv("encoder.conv_out", 512, 8)
    conv("decoder.conv_in", 4, 512)
    middle("decoder")
    for level in (3, 2, 1, 0):
        for block in range(3):
            residual(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    conv("decoder.conv_out", 128, 3)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return shapes


def published_shapes(helper, monkeypatch, family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published single-file checkpoint, from the writer of the tiny ones at full size."""
    (channels, multipliers, depths, middle), encoders = PUBLISHED[family]
    tiny = helper.FAMILIES[family]
    sizes = helper.TinyFamily(
        name=family,
        kind=family,
        channels=channels,
        multipliers=multipliers,
        depths=depths,
        middle_depth=middle,
        text_encoders=tuple(
            dataclasses.replace(encoder, width=encoders[encoder.key][0], layers=encoders[encoder.key][1])
            for encoder in tiny.text_encoders
        ),
        linear_projections=tiny.linear_projections,
        v_prediction=tiny.v_prediction,
        latent_scale=tiny.latent_scale,
    )

    def normal(weights, name, shape, std, mean=0.0):
        weights[name] = torch.empty(shape, device="meta")

    monkeypatch.setattr(helper._Weights, "normal", normal)
    tensors = {f"model.diffusion_model.{name}": value for name, value in helper._unet(sizes, 0).items()}
    for encoder in sizes.text_encoders:
        tensors |= {encoder.prefix + name: value for name, value in helper._text_encoder(encoder, 0).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {f"first_stage_model.{name}": shape for name, shape in vae_shapes().items()}
    # What training left in the published files and no loader reads.
    shapes |= {"alphas_cumprod": (1000,), "model_ema.decay": ()}
    for encoder in sizes.text_encoders:
        if not encoder.openclip_names:
            shapes[f"{encoder.prefix}embeddings.position_ids"] = (1, 77)
    return shapes


def write_hollow(path, shapes):
    """A float16 safetensors file with a true header and a hole for its data: no disk, no memory."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path
