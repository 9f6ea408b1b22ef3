"""Custom Diffusion files: weights of cross-attention with their tokens, ours and the authors' delta.bin."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import FormatError
from .formats import read_safetensors, read_torch_file, write_safetensors, write_torch_file
from .learned_embeddings import ANY, BUNDLE, LearnedEmbedding, as_rows, as_trigger, embeddings_from_tensors
from .lora import LowRankDelta, diffusers_tensors, parse_lora
from .tokens import plain_name

FORMAT = "custom-diffusion/1"
Part = Literal["keys_values", "cross_attention"]
_TRAINED = {
    "keys_values": re.compile(r"attn2\.to_[kv]\.weight$"),
    "cross_attention": re.compile(r"attn2\.(to_[qkv]\.weight|to_out\.0\.(weight|bias))$"),
}
_UNET = "unet."
_FACTOR = re.compile(r"\.lora_[AB]\.weight$")


def is_trained(name: str, part: Part = "keys_values") -> bool:
    """Whether Custom Diffusion trains the UNet's parameter of that name (diffusers' spelling)."""
    return _TRAINED[part].search(name) is not None


@dataclass(frozen=True)
class CustomDiffusion:
    """What a training changed, by diffusers' parameter names."""

    weights: dict[str, Tensor]
    """Whole weights, each (inner dim, text dim) where they are of keys and values."""
    tokens: tuple[LearnedEmbedding, ...] = ()
    changes: dict[str, LowRankDelta] = field(default_factory=dict)
    """In place of a whole weight, a change of the base's own."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the file says of itself."""

    @property
    def names(self) -> set[str]:
        """Of all parameters that are changed."""
        return {*self.weights, *self.changes}

    def weight(self, name: str, own: Tensor) -> Tensor:
        """The changed weight, in the dtype of the base's own."""
        if name in self.weights:
            return self.weights[name].to(own)
        change = self.changes[name]
        return (own.float() + change.scale * (change.up.float() @ change.down.float()).to(own.device)).to(own.dtype)


def compressed(change: Tensor, share: float) -> LowRankDelta:
    """The largest singular values of a change, with their vectors, whose sum reaches ``share`` of all values' sum.

    Both factors get the roots of the values. The authors leave out the value that reaches the share
    (adobe-research/custom-diffusion, compress.py), and so may keep none; at least one is kept here.

    Args:
        change: (out, in).
        share: 0..1; the authors' 0.6 makes files about five times smaller.
    """
    left, values, right = torch.linalg.svd(change.float(), full_matrices=False)
    reached = values.cumsum(0) < share * values.sum()
    rank = min(int(reached.sum()) + 1, len(values))
    roots = values[:rank].sqrt()
    return LowRankDelta(down=roots[:, None] * right[:rank], up=left[:, :rank] * roots)


def read_custom_diffusion(path: Path) -> CustomDiffusion:
    """Read a file of ours, or the authors' delta.bin, compressed or not, with a vector or a matrix of rows per token.

    Raises:
        FormatError: the file holds no such weights, or they are no numbers.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        tensors, metadata = read_safetensors(path)
        unet = {key: value for key, value in tensors.items() if key.startswith(_UNET)}
        changes = parse_lora({key: value for key, value in unet.items() if _FACTOR.search(key)}, path.name)
        weights = {key.removeprefix(_UNET): value for key, value in unet.items() if not _FACTOR.search(key)}
        changes = {f"{name.removeprefix(_UNET)}.weight": change for name, change in changes.items()}
        bundled = {key: value for key, value in tensors.items() if key.startswith(BUNDLE)}
        tokens = embeddings_from_tensors(path, bundled, metadata) if bundled else []
    else:
        metadata, contents = {}, read_torch_file(path)
        entries, words = contents.get("unet"), contents.get("modifier_token") or {}
        if not isinstance(entries, Mapping) or not isinstance(words, Mapping):
            raise FormatError(
                f"{path.name}: expected Custom Diffusion's entries unet and modifier_token; choose another"
            )
        weights = {name: value for name, value in entries.items() if not isinstance(value, Mapping)}
        changes = {name: _factors(value) for name, value in entries.items() if isinstance(value, Mapping)}
        tokens = [LearnedEmbedding(as_trigger(str(name)), {ANY: as_rows(rows, path)}) for name, rows in words.items()]
    for name, value in [*weights.items(), *changes.items()]:
        if not is_trained(name, "cross_attention") or not _is_usable(name, value):
            raise FormatError(
                f"{path.name}: the entry {name} is no weight of cross-attention; was it made by another method?"
            )
    if not weights and not changes:
        raise FormatError(f"{path.name}: holds no weights of cross-attention; choose a Custom Diffusion file")
    weights = {name: value.detach() for name, value in weights.items()}
    return CustomDiffusion(weights, tuple(tokens), changes, metadata)


def _factors(entry: Mapping[str, Any]) -> LowRankDelta | None:
    """The authors' compressed entry: u (out, rank) and v (rank, in)."""
    up, down = entry.get("u"), entry.get("v")
    matrices = isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 2
    return LowRankDelta(down.detach(), up.detach()) if matrices and up.shape[1] == down.shape[0] else None


def _is_usable(name: str, value: Tensor | LowRankDelta | None) -> bool:
    if isinstance(value, LowRankDelta):
        return all(factor.ndim == 2 and bool(factor.isfinite().all()) for factor in (value.down, value.up))
    axes = 1 if name.endswith(".bias") else 2
    return isinstance(value, Tensor) and value.ndim == axes and bool(value.isfinite().all())


def write_custom_diffusion(
    path: Path, changed: CustomDiffusion, metadata: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Write ``unet.<name>``, in place of compressed weights their factors in peft's layout, and
    ``bundle_emb.<token>.<encoder>``; errors as write_safetensors.
    """
    tensors = {f"{_UNET}{name}": weight for name, weight in changed.weights.items()}
    tensors |= diffusers_tensors(
        {f"{_UNET}{name.removesuffix('.weight')}": change for name, change in changed.changes.items()}
    )
    for token in changed.tokens:
        tensors |= {f"{BUNDLE}{plain_name(token.trigger)}.{key}": rows for key, rows in token.rows.items()}
    return write_safetensors(path, tensors, metadata, overwrite=overwrite)


def write_authors_file(path: Path, changed: CustomDiffusion, *, overwrite: bool = False) -> Path:
    """Write delta.bin as the authors do: a vector per token, a matrix for one of several rows; errors as above.

    Compressed weights become the u and v of their compress.py. Their layout has room for one text encoder; of SDXL's
    two the first is written.
    """
    words = {}
    for token in changed.tokens:
        rows = next(iter(token.rows.values())).detach().to("cpu")
        words[token.trigger] = (rows[0] if len(rows) == 1 else rows).clone()
    unet: dict[str, Any] = {name: weight.detach().to("cpu").clone() for name, weight in changed.weights.items()}
    for name, change in changed.changes.items():
        up, down = (change.up * change.scale).to("cpu").clone(), change.down.to("cpu").clone()
        unet[name] = {"u": up, "v": down}
    return write_torch_file(path, {"unet": unet, "modifier_token": words}, overwrite=overwrite)
