"""Custom Diffusion files: keys and values of cross-attention with their tokens, ours and the authors' delta.bin."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import FormatError
from .formats import read_safetensors, read_torch_file, write_safetensors, write_torch_file
from .learned_embeddings import ANY, BUNDLE, LearnedEmbedding, as_trigger, embeddings_from_tensors
from .tokens import plain_name

FORMAT = "custom-diffusion/1"
_TRAINED = re.compile(r"attn2\.to_[kv]\.weight$")
_UNET = "unet."


def is_trained(name: str) -> bool:
    """Whether Custom Diffusion trains the UNet's parameter of that name (diffusers' spelling)."""
    return _TRAINED.search(name) is not None


@dataclass(frozen=True)
class CustomDiffusion:
    """What a training changed."""

    weights: dict[str, Tensor]
    """Whole weights by diffusers' parameter names, each (inner dim, text dim)."""
    tokens: tuple[LearnedEmbedding, ...] = ()


def read_custom_diffusion(path: Path) -> CustomDiffusion:
    """Read a file of ours, or the authors' delta.bin with a vector or a matrix of rows per token.

    Raises:
        FormatError: the file holds no such weights, or they are no numbers.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        tensors, metadata = read_safetensors(path)
        weights = {key.removeprefix(_UNET): value for key, value in tensors.items() if key.startswith(_UNET)}
        bundled = {key: value for key, value in tensors.items() if key.startswith(BUNDLE)}
        tokens = embeddings_from_tensors(path, bundled, metadata) if bundled else []
    else:
        contents = read_torch_file(path)
        weights, words = contents.get("unet"), contents.get("modifier_token") or {}
        if not isinstance(weights, Mapping) or not isinstance(words, Mapping):
            raise FormatError(
                f"{path.name}: expected Custom Diffusion's entries unet and modifier_token; choose another"
            )
        tokens = [
            LearnedEmbedding(as_trigger(str(name)), {ANY: rows.detach().float().reshape(-1, rows.shape[-1])})
            for name, rows in words.items()
        ]
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or not is_trained(name) or not value.isfinite().all():
            raise FormatError(
                f"{path.name}: the entry {name} is no weight of keys or values of cross-attention; was it made by "
                "another method, or compressed?"
            )
    if not weights:
        raise FormatError(f"{path.name}: holds no keys and values of cross-attention; choose a Custom Diffusion file")
    return CustomDiffusion({name: value.detach() for name, value in weights.items()}, tuple(tokens))


def write_custom_diffusion(
    path: Path, changed: CustomDiffusion, metadata: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Write ``unet.<name>`` and ``bundle_emb.<token>.<encoder>``; errors as write_safetensors."""
    tensors = {f"{_UNET}{name}": weight for name, weight in changed.weights.items()}
    for token in changed.tokens:
        tensors |= {f"{BUNDLE}{plain_name(token.trigger)}.{key}": rows for key, rows in token.rows.items()}
    return write_safetensors(path, tensors, metadata, overwrite=overwrite)


def write_authors_file(path: Path, changed: CustomDiffusion, *, overwrite: bool = False) -> Path:
    """Write delta.bin as the authors do: a vector per token, a matrix for one of several rows; errors as above.

    Their layout has room for one text encoder; of SDXL's two the first is written.
    """
    words = {}
    for token in changed.tokens:
        rows = next(iter(token.rows.values())).detach().to("cpu")
        words[token.trigger] = (rows[0] if len(rows) == 1 else rows).clone()
    unet = {name: weight.detach().to("cpu").clone() for name, weight in changed.weights.items()}
    return write_torch_file(path, {"unet": unet, "modifier_token": words}, overwrite=overwrite)
