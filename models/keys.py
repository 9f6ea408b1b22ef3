"""Names of UNet modules: diffusers' dotted names, the original (SGM) names, and kohya's underscored ones."""

import re

# Identifiers that contain underscores themselves; everything else in a kohya key is separated by them.
_COMPOUND = (
    "down_blocks up_blocks mid_block transformer_blocks time_embedding add_embedding time_embed label_emb "
    "input_blocks output_blocks middle_block emb_layers in_layers out_layers skip_connection "
    "to_q to_k to_v to_out proj_in proj_out conv_in conv_out conv_shortcut time_emb_proj norm_out conv_norm_out "
    "linear_1 linear_2 text_model text_projection token_embedding position_embedding self_attn "
    "q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm"
).split()
_PIECE = re.compile("|".join(sorted(map(re.escape, _COMPOUND), key=len, reverse=True)) + r"|[^_]+")


def dotted(underscored: str) -> str:
    """``down_blocks_0_attentions_1_to_q`` -> ``down_blocks.0.attentions.1.to_q``."""
    return ".".join(_PIECE.findall(underscored))


def to_sgm(module: str, layers_per_block: int = 2) -> str:
    """diffusers' name of a module inside an attention block -> the original checkpoint's name.

    The original counts resnets, attentions and resamplers of one side in a single list: level i,
    position j is input block 1 + (n+1)·i + j and output block (n+1)·i + j for n layers per block.
    """
    if match := re.fullmatch(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", module):
        level, position, rest = int(match[1]), int(match[2]), match[3]
        return f"input_blocks.{1 + (layers_per_block + 1) * level + position}.1.{rest}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", module):
        level, position, rest = int(match[1]), int(match[2]), match[3]
        return f"output_blocks.{(layers_per_block + 1) * level + position}.1.{rest}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", module):
        return f"middle_block.1.{match[1]}"
    return module


def sgm_to_diffusers(module: str, layers_per_block: int = 2) -> str:
    """Inverse of to_sgm; names in diffusers' form already are returned unchanged."""
    if match := re.fullmatch(r"input_blocks\.(\d+)\.1\.(.+)", module):
        level, position = divmod(int(match[1]) - 1, layers_per_block + 1)
        return f"down_blocks.{level}.attentions.{position}.{match[2]}"
    if match := re.fullmatch(r"output_blocks\.(\d+)\.1\.(.+)", module):
        level, position = divmod(int(match[1]), layers_per_block + 1)
        return f"up_blocks.{level}.attentions.{position}.{match[2]}"
    if match := re.fullmatch(r"middle_block\.1\.(.+)", module):
        return f"mid_block.attentions.0.{match[1]}"
    return module
