"""Model dimensions read off the tensor shapes of a single-file checkpoint, in diffusers' terms."""

import re
from typing import Any

from ..models.errors import IncompatibleModelError
from ..models.families import EncoderSlot, Family

Shapes = dict[str, tuple[int, ...]]

HEAD_DIM = 64
"""Channels per head of every CLIP text encoder of these families."""
END_TOKEN = 49407
TIME_EMBEDDING = 256
"""Channels that SDXL spends on each of its six size numbers."""


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules lie directly under ``prefix``."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match.group(1) for name in shapes if (match := pattern.match(name))})


def context_width(shapes: Shapes) -> int | None:
    """Width of the text context that the UNet attends to; None when it has no cross-attention."""
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight"):
            return shape[1]
    return None


def unet_config(shapes: Shapes, family: Family, name: str) -> dict[str, Any]:
    """UNet2DConditionModel's arguments for a UNet in the original layout.

    Args:
        shapes: without the prefix ``model.diffusion_model.``.
        name: file name for messages.

    Raises:
        IncompatibleModelError: a distilled or otherwise irregular UNet.
    """
    levels: list[list[int]] = [[]]  # transformer depth of each residual block, by resolution
    widths: list[int] = [0]
    for block in range(1, count_blocks(shapes, "input_blocks.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
            widths.append(0)
        else:
            widths[-1] = shapes.get(f"input_blocks.{block}.0.in_layers.2.weight", (0,))[0]
            levels[-1].append(count_blocks(shapes, f"input_blocks.{block}.1.transformer_blocks."))
    layers = len(levels[0])
    middle = count_blocks(shapes, "middle_block.1.transformer_blocks.")
    outputs = [
        count_blocks(shapes, f"output_blocks.{block}.1.transformer_blocks.")
        for block in range(count_blocks(shapes, "output_blocks."))
    ]
    depths = [level[0] if level else 0 for level in levels]
    regular = (
        layers > 0
        and all(level == [depth] * layers for level, depth in zip(levels, depths))
        and outputs == [depth for depth in reversed(depths) for _ in range(layers + 1)]
        and depths[-1] in (0, middle)
        and middle > 0
    )
    if not regular:
        raise IncompatibleModelError(
            f"{name}: found a distilled or pruned {family.label} UNet (transformer depths {levels}, {middle}, "
            f"{outputs}); expected the regular architecture, choose an ordinary {family.label} checkpoint"
        )
    transformer_layers = [depth or 1 for depth in depths[:-1]] + [middle]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    heads = family.heads or [max(1, width // family.head_dim) for width in widths]
    config: dict[str, Any] = {
        "sample_size": family.resolution // 8,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": tuple(down),
        "up_block_types": tuple(block.replace("Down", "Up") for block in reversed(down)),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "cross_attention_dim": context_width(shapes),
        # diffusers calls the number of heads by this name.
        "attention_head_dim": heads,
        "transformer_layers_per_block": 1 if set(transformer_layers) == {1} else transformer_layers,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        "upcast_attention": family.name == "sd21",  # its attention overflows in half precision
    }
    if family.size_conditioning:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_EMBEDDING,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def clip_config(shapes: Shapes, slot: EncoderSlot, *, drop_last: bool) -> dict[str, Any]:
    """CLIPTextConfig's arguments for a text encoder in the original layout.

    Args:
        shapes: names either as transformers writes them, without ``text_model.``, or as open_clip does.
        drop_last: leave out the last layer, which a model with ``penultimate`` and a final norm never uses.
    """
    if "transformer.resblocks.0.ln_1.weight" in shapes:
        table, positions = shapes["token_embedding.weight"], shapes["positional_embedding"]
        layers = count_blocks(shapes, "transformer.resblocks.")
        inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
        projection = shapes.get("text_projection", shapes.get("text_projection.weight", (0, table[1])[::-1]))
        # open_clip multiplies from the left: its matrix is (hidden, projection), a linear layer's the reverse.
        projected = projection[1] if "text_projection" in shapes else projection[0]
    else:
        table, positions = shapes["embeddings.token_embedding.weight"], shapes["embeddings.position_embedding.weight"]
        layers = count_blocks(shapes, "encoder.layers.")
        inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
        projected = table[1]
    return {
        "vocab_size": table[0],
        "hidden_size": table[1],
        "intermediate_size": inner,
        "projection_dim": projected,
        "num_hidden_layers": layers - drop_last,
        "num_attention_heads": max(1, table[1] // HEAD_DIM),
        "max_position_embeddings": positions[0],
        "hidden_act": slot.activation,
        # transformers looks for the highest id when this is 2, which a learned token would take over.
        "eos_token_id": END_TOKEN,
    }


def vae_config(shapes: Shapes, latent_scale: float) -> dict[str, Any]:
    """AutoencoderKL's arguments, from names of the original (``encoder.down.0``) or of diffusers' layout."""
    if "encoder.down.0.block.0.conv1.weight" in shapes:
        down, block = "encoder.down.", "block"
    else:
        down, block = "encoder.down_blocks.", "resnets"
    levels = count_blocks(shapes, down)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(shapes[f"{down}{level}.{block}.0.conv1.weight"][0] for level in range(levels)),
        "layers_per_block": count_blocks(shapes, f"{down}0.{block}."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": latent_scale,
    }
