"""The parts of a single-file checkpoint: UNet, text encoders and autoencoder in their original layout."""

import re

import torch
from torch import Tensor

from ..models.errors import IncompatibleModelError
from ..models.families import SD15, SD21, SDXL, EncoderSlot, Family
from .architecture import (
    TIME_EMBEDDING,
    Shapes,
    clip_config,
    context_width,
    unet_config,
    vae_config,
)
from .modules import Component, Tensors, without
from .weights import Weights

UNET = "model.diffusion_model."
VAE = "first_stage_model."
_OPEN_CLIP_H = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
_TEXT_PREFIXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("sd15", "clip_l"): ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ("sd21", "clip_h"): _OPEN_CLIP_H,
    ("sdxl", "clip_l"): ("conditioner.embedders.0.transformer.text_model.",),
    ("sdxl", "clip_g"): ("conditioner.embedders.1.model.",),
}
_UNUSED_TEXT = ("position_ids", "logit_scale", "attn_mask")
_FOREIGN = {
    "joint_blocks.0.context_block.attn.qkv.weight": "SD3",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "clf.1.weight": "Stable Cascade",
    "transformer.rotary_pos_emb.inv_freq": "Stable Audio",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "mlp_t5.0.weight": "HunyuanDiT",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    "t5_yproj.weight": "Mochi",
    "adaln_single.emb.timestep_embedder.linear_1.bias": "PixArt or LTX-Video",
    "cap_embedder.1.weight": "Lumina 2",
    "head.modulation": "Wan",
    "txt_norm.weight": "Qwen-Image",
}
_INPUT_CHANNELS = {
    5: "a depth-conditioned model",
    7: "an upscaler",
    8: "an image-editing or video model",
    9: "an inpainting model",
}


def detect_family(weights: Weights) -> Family:
    """Family of a single-file checkpoint, by its shapes as ComfyUI does (comfy/model_detection.py).

    Raises:
        IncompatibleModelError: anything but a whole SD1.5, SD2.1 or SDXL text-to-image model.
    """
    shapes = weights.shapes
    unet = weights.under(UNET)
    if "input_blocks.0.0.weight" not in unet or "out.2.weight" not in unet:
        raise _refuse(weights, _foreign(shapes, unet))
    if any("time_stack" in name or "time_mixer" in name for name in unet):
        raise _refuse(weights, "a video model")
    channels = unet["input_blocks.0.0.weight"][1]
    if channels != 4:
        raise _refuse(weights, _INPUT_CHANNELS.get(channels, "a UNet") + f" ({channels} input channels)")
    if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
        raise _refuse(weights, "a model with EDM noise levels, such as Playground 2.5")
    context = context_width(unet)
    vector = unet.get("label_emb.0.0.weight", (0, None))[1]
    encoders = {key: table[1] for key in _TEXT_PREFIXES if (table := _text_table(weights, *key))}
    if not encoders:
        raise _refuse(weights, "a UNet without text encoders")
    if ("sdxl", "clip_g") in encoders and ("sdxl", "clip_l") in encoders:
        total = encoders["sdxl", "clip_l"] + encoders["sdxl", "clip_g"]
        if context == total and vector == encoders["sdxl", "clip_g"] + 6 * TIME_EMBEDDING:
            return SDXL
    elif vector is not None:
        refiner = "conditioner.embedders.0.model.ln_final.weight" in shapes
        raise _refuse(weights, "the SDXL refiner" if refiner else "an unCLIP model")
    elif context == encoders.get(("sd15", "clip_l")):
        return SD15
    elif context == encoders.get(("sd21", "clip_h")):
        return SD21
    raise _refuse(weights, f"an unknown UNet (text width {context}, vector width {vector}, encoders {encoders})")


def _refuse(weights: Weights, found: str) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"{weights.name}: found {found}; training needs a whole SD1.5, SD2.1 or SDXL text-to-image checkpoint"
    )


def _foreign(shapes: Shapes, unet: Shapes) -> str:
    bare = {name.removeprefix(UNET) for name in shapes}
    for name, label in _FOREIGN.items():
        if name in bare:
            return f"{label} weights"
    if any(".lora_" in name or name.startswith("lora_") for name in shapes):
        return "a LoRA"
    if "input_blocks.0.0.weight" in bare or "down_blocks.0.resnets.0.conv1.weight" in bare:
        return "a UNet without text encoders and autoencoder"
    if "decoder.conv_in.weight" in bare or "taesd_decoder.1.weight" in bare:
        return "an autoencoder (VAE)"
    if bare & {"emb_params", "clip_l", "clip_g", "clip_h"}:
        return "a text embedding"
    return f"{len(unet) or len(shapes)} tensors of an unknown model" if shapes else "no tensors"


def _text_table(weights: Weights, family: str, key: str) -> tuple[str, int] | None:
    """Name prefix and width of a text encoder, or None when the file has none under that family's names."""
    for prefix in _TEXT_PREFIXES[family, key]:
        for table in ("embeddings.token_embedding.weight", "token_embedding.weight"):
            if (shape := weights.shapes.get(prefix + table)) is not None:
                return prefix, shape[1]
    return None


def predicts_velocity(weights: Weights, family: Family) -> bool:
    """Whether the UNet predicts velocity: the file says so, or it is SD2.1's 768-pixel model.

    The latter is told by the spread of one bias, as ComfyUI does (comfy/supported_models.py, SD20).
    """
    if "v_pred" in weights.shapes:
        return True
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if family is not SD21 or name not in weights.shapes:
        return False
    return weights.read([name], torch.float32)[name].std(unbiased=False).item() > 0.09


def unet_component(weights: Weights, family: Family) -> Component:
    """The UNet; IncompatibleModelError when its architecture is irregular."""
    config = unet_config(weights.under(UNET), family, weights.name)

    def convert(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        converted = convert_ldm_unet_checkpoint(tensors, config=config)
        used = {id(tensor) for tensor in converted.values()}
        if unused := sorted(name for name, tensor in tensors.items() if id(tensor) not in used):
            raise IncompatibleModelError(
                f"{weights.name}: the UNet has weights that {family.label} does not know ({len(unused)}, such as "
                f"{unused[0]}); choose an ordinary, unquantized {family.label} checkpoint"
            )
        return converted

    return Component("unet", config, weights, tuple(n for n in weights.shapes if n.startswith(UNET)), convert)


def text_component(weights: Weights, family: Family, slot: EncoderSlot) -> Component:
    """One text encoder.

    Encoders whose penultimate layer goes through the final norm (SD2.1) lose their last layer, which
    nothing uses; so they are the same modules as in a diffusers folder.
    """
    table = _text_table(weights, family.name, slot.key)
    if table is None:
        raise _refuse(weights, f"an {family.label} model without its text encoder {slot.key}")
    prefix = table[0]
    shapes = weights.under(prefix)
    config = clip_config(shapes, slot, drop_last=slot.layer == "penultimate" and slot.final_norm)
    projected = family.size_conditioning and slot is family.encoders[-1]
    unused = _UNUSED_TEXT if projected else (*_UNUSED_TEXT, "text_projection", "text_projection.weight")
    names = without((prefix + name for name in shapes), *unused)

    def convert(tensors: Tensors) -> Tensors:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if "transformer.resblocks.0.ln_1.weight" in tensors:
            return open_clip_to_transformers(tensors, layers=config["num_hidden_layers"])
        return {f"text_model.{name}": tensor for name, tensor in tensors.items()}

    return Component("text_projection" if projected else "text", config, weights, names, convert)


_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
}


def open_clip_to_transformers(tensors: Tensors, *, layers: int) -> Tensors:
    """Rename open_clip's text weights and split its joint query, key and value matrix.

    diffusers has such a function; it drops layer 23 by name, whatever the depth, so it serves one model only.

    Args:
        tensors: by open_clip's names, without prefix.
        layers: how many layers to keep, from the first.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _OPEN_CLIP_TOP:
            converted[_OPEN_CLIP_TOP[name]] = tensor
        elif name == "text_projection":
            converted["text_projection.weight"] = tensor.T.contiguous()
        elif name.startswith("transformer.resblocks."):
            _, _, number, part = name.split(".", 3)
            if int(number) >= layers:
                continue
            layer = f"text_model.encoder.layers.{number}"
            module, _, leaf = part.rpartition(".")
            if part.startswith("attn.in_proj_"):
                leaf = part.removeprefix("attn.in_proj_")
                for projection, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                    converted[f"{layer}.self_attn.{projection}.{leaf}"] = rows.contiguous()
            else:
                converted[f"{layer}.{_OPEN_CLIP_LAYER.get(module, module)}.{leaf}"] = tensor
        else:
            converted[name] = tensor  # left for the strict check to name
    return converted


_TINY_VAE = ("taesd_decoder.1.weight", "decoder.layers.0.weight")
"""The first weight of a TAESD's decoder beside its encoder: in a checkpoint, and as diffusers saves them."""
_TINY_DECODER = "1.weight"
"""The same in a file of its own, as the authors publish both halves and ComfyUI keeps them."""
_TAESD_LAYER = re.compile(r"(?:taesd_(encoder|decoder)\.)?(\d{1,3})\.(.+)")


def vae_component(weights: Weights, family: Family, *, decoder_alone: bool = False) -> Component:
    """The autoencoder, of a whole checkpoint or of a file of its own, in the original, diffusers' or TAESD's layout.

    Args:
        decoder_alone: whether a TAESD's decoder without its encoder does, too.
    """
    prefix = next((p for p in (VAE, "vae.") if any(name.startswith(p) for name in weights.shapes)), "")
    shapes = weights.under(prefix)
    tiny = (*_TINY_VAE, _TINY_DECODER) if decoder_alone else _TINY_VAE
    full = ("decoder.conv_in.weight",) if "encoder.conv_in.weight" in shapes else ()
    first = next((name for name in (*tiny, *full) if name in shapes), None)
    if first is None:
        raise IncompatibleModelError(
            f"{weights.name}: found no autoencoder (VAE); choose a checkpoint that has one, or give a VAE beside it"
        )
    channels = (*shapes[first], 0, 0)[1]
    if channels != 4 or len(shapes[first]) != 4:
        raise IncompatibleModelError(
            f"{weights.name}: found an autoencoder with {channels} latent channels; {family.label} needs one with 4, "
            f"choose an {family.label} VAE"
        )
    if first in tiny:
        return _tiny_vae_component(weights, prefix, shapes, alone=first == _TINY_DECODER)
    config = vae_config(shapes, family.latent_scale)

    def convert(tensors: Tensors) -> Tensors:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if "encoder.down.0.block.0.conv1.weight" not in tensors:
            return modern_vae_names(tensors)
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        return convert_ldm_vae_checkpoint(tensors, config)

    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # training files add loss.* and the like
    names = tuple(prefix + name for name in shapes if name.startswith(parts))
    return Component("vae", config, weights, names, convert)


def modern_vae_names(tensors: Tensors) -> Tensors:
    """diffusers' names for the attention of an autoencoder saved before diffusers 0.13 or so."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        renamed[name] = tensor
    return renamed


def _tiny_vae_component(weights: Weights, prefix: str, shapes: Shapes, *, alone: bool) -> Component:
    halves = ("taesd_encoder.", "taesd_decoder.", "encoder.layers.", "decoder.layers.")
    names = tuple(prefix + name for name in shapes if alone or name.startswith(halves))

    def convert(tensors: Tensors) -> Tensors:
        converted: Tensors = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(prefix)
            if numbered := _TAESD_LAYER.fullmatch(name):
                half = numbered[1] or "decoder"
                # TAESD's decoder begins with a clamp, which diffusers applies outside its numbered layers.
                name = f"{half}.layers.{int(numbered[2]) - (half == 'decoder')}.{numbered[3]}"
            converted[name] = tensor
        return converted

    return Component("tiny_decoder" if alone else "tiny_vae", {}, weights, names, convert)
