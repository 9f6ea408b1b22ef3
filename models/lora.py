"""Low-rank adaptation evaluated beside a frozen weight, y = Wx + s·BAx, and its file formats."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import FormatError
from .keys import dotted, sgm_to_diffusers, to_sgm


@dataclass(frozen=True)
class LowRankDelta:
    """The change BA of one linear or convolution layer (arXiv 2106.09685, eq. 3), scale alpha/rank included.

    ``down`` is A, (rank, in) or (rank, in, kh, kw); ``up`` is B, (out, rank) or (out, rank, 1, 1);
    ``mid`` is the Tucker core of convolution LoRAs, (rank, rank, kh, kw).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def to(self, like: Tensor) -> "LowRankDelta":
        """The same change on the device and in the dtype of ``like``."""
        mid = None if self.mid is None else self.mid.to(like)
        return LowRankDelta(self.down.to(like), self.up.to(like), self.scale, mid)

    def linear(self, x: Tensor) -> Tensor:
        """s·BAx for x (..., in) -> (..., out)."""
        return F.linear(self._scaled(F.linear(x, self.down.flatten(1))), self.up.flatten(1))

    def conv2d(self, x: Tensor, *, stride, padding, dilation) -> Tensor:
        """The same for a convolution, x (batch, in, height, width)."""
        if self.mid is not None:
            hidden = F.conv2d(x, self.down)
            hidden = F.conv2d(hidden, self.mid, stride=stride, padding=padding, dilation=dilation)
        else:
            hidden = F.conv2d(x, self.down, stride=stride, padding=padding, dilation=dilation)
        return F.conv2d(self._scaled(hidden), self.up)

    def _scaled(self, hidden: Tensor) -> Tensor:
        # Between A and B there are rank channels, behind B a hundred times as many.
        return hidden if self.scale == 1.0 else hidden * self.scale


_DOWN_UP = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
_KOHYA_PREFIXES = {
    "lora_unet_": "unet.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te_": "text_encoder.",
}


_MATRICES = (*(suffix for pair in _DOWN_UP for suffix in pair), ".lora_mid.weight", ".lora_A", ".lora_B")


def check_low_rank(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise FormatError when a LoRA's tensors cannot be its parts, as in damaged files; other tensors pass.

    Args:
        tensors: in any layout.
        name: file name, for the message.
    """
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            if tensor.numel() != 1 or not math.isfinite(tensor):
                raise FormatError(f"{name}: {key} is not a finite number; the file is damaged, download it again")
        elif key.endswith(_MATRICES) and (tensor.ndim < 2 or not tensor.numel()):
            shape = "×".join(map(str, tensor.shape)) or "a single number"
            raise FormatError(
                f"{name}: {key} is {shape}, expected a matrix of rank 1 or more; the file is damaged, download it again"
            )


def parse_lora(
    tensors: Mapping[str, Tensor], name: str = "LoRA", *, layers_per_block: int = 2
) -> dict[str, LowRankDelta]:
    """Plain LoRAs of diffusers, peft or kohya layout -> change per layer, under diffusers' dotted module names.

    Names start with ``unet.``, ``text_encoder.`` or ``text_encoder_2.``.

    Args:
        tensors: contents of the file; ``bundle_emb.*`` entries are passed over.
        name: file name, for messages.

    Raises:
        FormatError: a tensor belongs to something other than a plain LoRA, so that nothing is dropped in
            silence, or its shape cannot be.
    """
    check_low_rank(tensors, name)
    deltas, used = {}, set()
    for key, down in tensors.items():
        for down_suffix, up_suffix in _DOWN_UP:
            if not key.endswith(down_suffix):
                continue
            stem = key[: -len(down_suffix)]
            up_key, alpha_key, mid_key = stem + up_suffix, stem + ".alpha", stem + ".lora_mid.weight"
            if up_key not in tensors:
                raise FormatError(f"{name}: {key} has no partner {up_key}; the file is incomplete, download it again")
            up, mid = tensors[up_key], tensors.get(mid_key)
            middle = down.shape[:1] * 2 if mid is None else mid.shape[:2]
            if (up.shape[1], down.shape[0]) != tuple(middle):
                raise FormatError(f"{name}: {key} and {up_key} differ in rank; the file is damaged, download it again")
            alpha = float(tensors[alpha_key]) if alpha_key in tensors else float(down.shape[0])
            deltas[_module_name(stem, layers_per_block)] = LowRankDelta(down, up, alpha / down.shape[0], mid)
            used |= {key, up_key, alpha_key, mid_key}
            break
    leftover = sorted(key for key in tensors if key not in used and not key.startswith("bundle_emb."))
    if leftover:
        raise FormatError(
            f"{name}: {len(leftover)} tensors, such as {leftover[0]}, are not of a plain LoRA; expected "
            "lora_down/lora_up pairs, choose another file"
        )
    return deltas


def _module_name(stem: str, layers_per_block: int) -> str:
    for prefix, root in _KOHYA_PREFIXES.items():
        if stem.startswith(prefix):
            return root + sgm_to_diffusers(dotted(stem[len(prefix) :]), layers_per_block)
    stem = stem.removeprefix("base_model.model.").replace(".processor.", ".")  # peft's own files carry the former
    if not stem.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
        stem = "unet." + stem
    if stem.startswith("text_encoder"):
        # Old diffusers files call the text encoders' projections as the UNet's.
        for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
            stem = stem.replace(f".self_attn.{old}", f".self_attn.{new}")
    # They also write the UNet's output projection without its position in the Sequential.
    return stem + ".0" if stem.endswith(".to_out") else stem


def kohya_tensors(deltas: Mapping[str, LowRankDelta], family: str, *, layers_per_block: int = 2) -> dict[str, Tensor]:
    """Tensors in kohya's layout, the one that ComfyUI's, A1111's, kohya's and diffusers' loaders all read.

    SDXL's UNet modules carry the original (input_blocks, output_blocks) names there, those of SD1.5 and
    SD2.1 the diffusers names.
    """
    tensors = {}
    for name, delta in deltas.items():
        root, module = name.split(".", 1)
        if root == "unet":
            module = to_sgm(module, layers_per_block) if family == "sdxl" else module
            prefix = "lora_unet_"
        else:
            prefix = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}[
                root
            ]
        stem = prefix + module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = delta.down
        tensors[f"{stem}.lora_up.weight"] = delta.up
        tensors[f"{stem}.alpha"] = torch.tensor(delta.scale * delta.rank)
        if delta.mid is not None:
            tensors[f"{stem}.lora_mid.weight"] = delta.mid
    return tensors


def diffusers_tensors(deltas: Mapping[str, LowRankDelta]) -> dict[str, Tensor]:
    """Tensors in the layout that current diffusers writes; alpha is folded into ``up`` because it stores none."""
    tensors = {}
    for name, delta in deltas.items():
        if delta.mid is not None:
            raise FormatError(
                f"{name} is a Tucker-decomposed convolution, which diffusers cannot store; export to kohya instead"
            )
        tensors[f"{name}.lora_A.weight"] = delta.down
        tensors[f"{name}.lora_B.weight"] = delta.up * delta.scale
    return tensors
