"""The small world's two text-to-image models: built, encoded with, and laid out as single-file checkpoints.

The modules are those that the training base loads from such a file, so nothing about their architecture is
written twice; the sizes stand in tests/tiny/checkpoints.py, where the host's registration reads them too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny"))

from checkpoints import write_tiny_checkpoint  # noqa: E402 - lies in the folder that was just added

from comfyui_personalize.models.families import Family  # noqa: E402
from comfyui_personalize.trainers.base import TrainingBase, open_base  # noqa: E402

MODELS = ("world_sd15", "world_sdxl")


@dataclass
class TextToImage:
    """A trainable model: its parts in float32, and what their files are called inside a checkpoint."""

    name: str
    family: Family
    unet: nn.Module
    encoders: nn.ModuleList
    unet_names: dict[str, str]
    """Name inside the checkpoint of each of the UNet's weights."""

    def parameters(self) -> list[nn.Parameter]:
        return [*self.unet.parameters(), *self.encoders.parameters()]

    def encode(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Text context (batch, 77, width) and, for the SDXL kind, the pooled embedding (batch, width).

        Args:
            ids: (batch, 77) for each encoder, padded as the family does.
        """
        hidden, pooled = [], None
        for slot, encoder, numbers in zip(self.family.encoders, self.encoders, ids):
            output = encoder(input_ids=numbers, output_hidden_states=not slot.final_norm)
            hidden.append(output.last_hidden_state if slot.final_norm else output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)
        return torch.cat(hidden, dim=-1), pooled


def build(name: str) -> TextToImage:
    """A model with the usual random start of its classes, from torch's global generator."""
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(write_tiny_checkpoint(name, Path(folder) / f"{name}.safetensors"))
        unet = base.load_unet()
        encoders = base.load_text_encoders()
        fresh = type(unet).from_config(unet.config)
        return TextToImage(
            name,
            base.family,
            fresh,
            nn.ModuleList(type(encoder)(encoder.config) for encoder in encoders),
            _file_names(base),
        )


def _file_names(base: TrainingBase) -> dict[str, str]:
    component = base.unet
    stand_ins = {name: torch.empty(component.weights.shapes[name], device="meta") for name in component.names}
    owner = {id(tensor): name for name, tensor in stand_ins.items()}
    return {name: owner[id(tensor)] for name, tensor in component.convert(dict(stand_ins)).items()}


def warm_start(model: TextToImage, trained: TextToImage) -> None:
    """Begin the SDXL kind where the SD1.5 kind ended.

    Convolutions and attention carry over, 1 x 1 convolutions becoming linear layers; the new text encoder's
    share of the cross-attention begins at zero, and so does what it adds.
    """
    _copy(model.unet, trained.unet)
    _copy(model.encoders[0], trained.encoders[0])


@torch.no_grad()
def _copy(target: nn.Module, source: nn.Module) -> None:
    known = source.state_dict()
    for name, weight in target.state_dict().items():
        if name not in known:
            continue
        given = known[name]
        if given.numel() == weight.numel():
            weight.copy_(given.view_as(weight))
        else:  # keys and values of the wider text context
            weight.zero_()
            weight[:, : given.shape[1]] = given


def checkpoint_tensors(model: TextToImage, unet: Mapping[str, Tensor], encoders: Sequence[Mapping[str, Tensor]]):
    """UNet and text encoders under the published checkpoints' names.

    Args:
        unet, encoders: state dictionaries, so that averaged weights can be laid out too.
    """
    tensors = {model.unet_names[name]: weight for name, weight in unet.items()}
    prefixes = {
        "sd15": ("cond_stage_model.transformer.text_model.",),
        "sdxl": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."),
    }[model.family.name]
    for prefix, weights in zip(prefixes, encoders):
        weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
        weights = {name: weight for name, weight in weights.items() if not name.endswith("position_ids")}
        if prefix.endswith(".model."):
            weights = _open_clip_names(weights)
        tensors |= {prefix + name: weight for name, weight in weights.items()}
    return tensors


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _open_clip_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' text weights as open_clip has them, query, key and value in one matrix."""
    renamed = {}
    for name, weight in weights.items():
        if name in _OPEN_CLIP:
            renamed[_OPEN_CLIP[name]] = weight
        elif name == "text_projection.weight":
            renamed["text_projection"] = weight.T
        else:
            _, _, number, part = name.split(".", 3)
            layer = f"transformer.resblocks.{number}"
            module, leaf = part.rsplit(".", 1)
            if module in _OPEN_CLIP_LAYER:
                renamed[f"{layer}.{_OPEN_CLIP_LAYER[module]}.{leaf}"] = weight
            elif module == "self_attn.q_proj":
                parts = [weights[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")]
                renamed[f"{layer}.attn.in_proj_{leaf}"] = torch.cat(parts)
    renamed["logit_scale"] = torch.tensor(4.6055)
    return renamed
