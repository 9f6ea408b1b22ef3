"""Matching a LoRA file to the model at hand, and refusing the files of another family by name."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from torch import Tensor, nn

from ..models.errors import FormatError, IncompatibleModelError
from ..models.lora import LowRankDelta, check_low_rank
from .families import lora_family, model_label

_PEFT_ROOTS = ("", "unet.", "base_model.model.", "unet.base_model.model.")
_SUFFIX = re.compile(
    r"(\.lora_(?:up|down|mid)\.weight|\.lora_[AB](?:\.default)?(?:\.weight)?|[._]lora\.(?:up|down)\.weight"
    r"|\.lora_linear_layer\.(?:up|down)\.weight|\.alpha|\.dora_scale|\.hada_\w+|\.lokr_\w+|\.oft_blocks|\.rescale"
    r"|\.[ab][12]\.weight|\.diff(?:_b)?|\.set_weight|\.reshape_weight|\.[wb]_norm)$"
)
_TEXT_STEM = re.compile(r"(lora_te\d*_|lora_prior_te_|text_encoders?[._]|text_encoder_2\.|te\d?_)")
_OPERATIONS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class LayerPatch:
    """What a LoRA does to one module of the UNet: a low-rank change, or the host's own patches."""

    low_rank: LowRankDelta | None = None
    weight: Any = None
    """A host patch of the weight: a weight adapter, or a tuple such as ("diff", (tensor,))."""
    bias: Any = None
    """A host patch of the bias."""


@dataclass(frozen=True)
class MatchedLora:
    """A LoRA file as it applies to one model."""

    unet: dict[str, LayerPatch]
    """By dotted module name inside the UNet."""
    text: dict[str, Any]
    """Host patches by parameter name of the text encoders."""


def match_lora(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model, clip=None) -> MatchedLora:
    """Find the layers that a LoRA of any layout the host reads changes in this MODEL and CLIP.

    Args:
        name: file name, for messages.
        tensors, metadata: contents of the file; ``bundle_emb.*`` entries are ignored.
        model: the host's MODEL, with a UNet.
        clip: the host's CLIP, or None to leave the text encoders alone.

    Raises:
        IncompatibleModelError: nothing fits, or a layer of that name has another shape.
        FormatError: the file is damaged, or the host has no arithmetic for its tensors.
    """
    tensors = {key: value for key, value in tensors.items() if not key.startswith("bundle_emb.")}
    if magnitude := next((key for key in tensors if "lora_magnitude_vector" in key), None):
        raise FormatError(
            f"{name}: {magnitude} is a DoRA in peft's layout, which ComfyUI cannot apply; "
            "convert it to the layout with dora_scale, or train a plain LoRA"
        )
    tensors = comfy.lora_convert.convert_lora(tensors)
    check_low_rank(tensors, name)
    stems = {_SUFFIX.sub("", key) for key in tensors if _SUFFIX.search(key)}
    unet_names = _unet_names(model)
    text_names = {} if clip is None else _text_names(clip)
    text_stems = {stem for stem in stems if stem in text_names or _TEXT_STEM.match(stem)}
    unet_stems = stems - text_stems
    fitting = {stem for stem in unet_stems if stem in unet_names}
    refusal = _refusal(name, tensors, metadata, model, len(fitting), len(unet_stems))
    usable_text = {stem for stem in text_stems if stem in text_names}
    if text_stems and not unet_stems and clip is None:
        raise IncompatibleModelError(f"{name} changes the text encoders alone; connect a CLIP to the loader")
    if not fitting and (unet_stems or not usable_text):
        raise IncompatibleModelError(refusal)

    unet = _unet_layers(comfy.lora.load_lora(tensors, unet_names, log_missing=False), model, refusal)
    text = comfy.lora.load_lora(tensors, text_names, log_missing=False) if text_names else {}
    text = {key: patch for key, patch in text.items() if key in clip.cond_stage_model.state_dict()} if text else {}
    _check_text(text, clip, refusal)
    if 2 * len(fitting) < len(unet_stems):
        raise IncompatibleModelError(refusal)
    unused = len(unet_stems - fitting) + len([key for key in tensors if not _SUFFIX.search(key)])
    if unused:
        logging.warning("%s: %d of its entries have no counterpart in this model and are left out", name, unused)
    if clip is not None and text_stems - usable_text:
        count = len(text_stems - usable_text)
        logging.warning("%s: %d text encoder layers have no counterpart in this CLIP and are left out", name, count)
    return MatchedLora(unet, text)


def _refusal(name: str, tensors: Mapping, metadata: Mapping, model, fitting: int, total: int) -> str:
    label, family = model_label(model), lora_family(tensors, metadata)
    found = f"a LoRA for {family}" if family and family != label else "a LoRA for another model"
    if not total:
        found = "no LoRA of this model"
    return (
        f"{name} looks like {found}: {fitting} of {total} layers fit this {label} model by name"
        f"; choose a LoRA made for {label}"
    )


def _unet_names(model) -> dict[str, str]:
    """LoRA layer name in every layout -> parameter of the host's model."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    # The host knows diffusers' names only with ".processor." in them; current diffusers and peft write none.
    for key, target in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items():
        if key.endswith(".weight"):
            stem = key.removesuffix(".weight")
            for spelling in {stem, re.sub(r"\.to_out\.0$", ".to_out", stem)}:
                for root in _PEFT_ROOTS:
                    names.setdefault(root + spelling, f"diffusion_model.{target}")
    return names


def _text_names(clip) -> dict[str, str]:
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    # transformers 5 dropped "text_model." from the names of one of its two CLIP classes.
    for name, target in list(names.items()):
        names.setdefault(name.replace(".text_model.", ".", 1), target)
    return names


def _unet_layers(patches: Mapping[str, Any], model, refusal: str) -> dict[str, LayerPatch]:
    network = model.model.diffusion_model
    found: dict[str, dict[str, Any]] = {}
    for key, patch in patches.items():
        module_name, parameter = key.removeprefix("diffusion_model.").rsplit(".", 1)
        module = network.get_submodule(module_name)
        current = getattr(module, parameter, None)
        if current is None:
            continue  # a bias that this model's layer does not have: the host leaves it out, too
        if not isinstance(module, _OPERATIONS):
            raise FormatError(f"{module_name} is a {type(module).__name__}, which no LoRA of this project can change")
        low_rank = _low_rank(patch, module) if parameter == "weight" else None
        if low_rank is None and not _fits(patch, current.shape, key):
            shape = "×".join(map(str, current.shape))
            raise IncompatibleModelError(f"{refusal} (layer {module_name} is {shape} here, the file's does not fit)")
        found.setdefault(module_name, {}).update({parameter: patch} if low_rank is None else {"low_rank": low_rank})
    layers = {}
    for module_name, parts in found.items():
        if "low_rank" in parts and "bias" in parts:
            # One hook per layer: with a bias the whole layer takes the dense route.
            parts = {"weight": patches[f"diffusion_model.{module_name}.weight"], "bias": parts["bias"]}
        layers[module_name] = LayerPatch(**parts)
    return layers


def _low_rank(patch: Any, module: nn.Module) -> LowRankDelta | None:
    """A plain LoRA or LoCon that fits the module, else None."""
    if getattr(patch, "name", None) != "lora" or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return None
    up, down, alpha, mid, dora_scale, reshape = patch.weights
    if dora_scale is not None or reshape is not None or getattr(module, "groups", 1) != 1:
        return None
    rank, shape = down.shape[0], module.weight.shape
    middle = rank if mid is None else mid.shape[0]
    if up.shape[0] != shape[0] or up.flatten(1).shape[1] != middle:
        return None
    inputs = shape[1:].numel() if mid is None else shape[1]
    if down.flatten(1).shape[1] != inputs:
        return None
    if isinstance(module, nn.Conv2d):
        down = down.reshape(rank, shape[1], *(shape[2:] if mid is None else (1, 1)))
        up = up.reshape(shape[0], middle, 1, 1)
        if mid is not None and (mid.ndim != 4 or mid.shape[1] != rank or mid.shape[2:] != shape[2:]):
            return None
    elif mid is not None:
        return None
    return LowRankDelta(down, up, 1.0 if alpha is None else alpha / rank, mid)


def _fits(patch: Any, shape: torch.Size, key: str) -> bool:
    """Whether the host's arithmetic gives this patch a change of the weight's shape.

    The host logs a mismatch and goes on; this runs the same arithmetic without data and watches its result.
    """
    if isinstance(patch, tuple):
        return patch[1][0].shape == shape
    seen = []

    def watch(change: Tensor) -> Tensor:
        seen.append(change.shape)
        return change

    # Rotations may branch on the size of an angle, for which they need numbers.
    device = "cpu" if patch.name in ("oft", "boft") else "meta"
    weight = torch.ones(shape, device=device)
    try:
        comfy.lora.calculate_weight([(1.0, patch, 1.0, None, watch)], weight, key)
    except (RuntimeError, IndexError, ZeroDivisionError):  # factors that do not even fit each other, or are empty
        return False
    return seen == [shape]


def _check_text(patches: Mapping[str, Any], clip, refusal: str) -> None:
    if not patches:
        return
    weights = clip.cond_stage_model.state_dict()
    for key, patch in patches.items():
        if not _fits(patch, weights[key].shape, key):
            raise IncompatibleModelError(f"{refusal} (text encoder layer {key} has another shape)")
