"""The trained encoder: all that is kept of a training, and the files it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, IncompatibleModelError
from ..formats import FORMAT_KEY, write_safetensors
from ..lora import LowRankDelta
from ..mapped import map_weights
from . import authors_file, ip_adapter_file
from .encoder_parts import KeyValueCopy, example, matrix_shape, read_parts
from .resampler import Resampler
from .word import PREFIX, WordHead

FORMAT = "lookahead-encoder/1"


@dataclass(frozen=True)
class LookaheadEncoder:
    """What makes the encoder out of SDXL's UNet, and what the decoder then needs.

    Modules carry diffusers' names; a block is a transformer block, ``mid_block.attentions.0.transformer_blocks.0``.
    """

    resampler: Resampler
    adapter: dict[str, tuple[Tensor, Tensor]]
    """Block -> weights that make keys and values of identity tokens, each (heads * dim, token width)."""
    lora: dict[str, LowRankDelta]
    """Linear layer -> its change while the UNet serves as the encoder; empty when it serves unchanged."""
    copies: dict[str, tuple[KeyValueCopy, KeyValueCopy]]
    """Block -> what makes the shared keys and values of self-attention's normalised input in the encoder's pass.

    That is self-attention's own projection plus a change, a full weight in its place, or None for itself.
    """
    name: str
    """File name, for messages."""
    metadata: dict[str, str]
    word: WordHead | None = None
    """Predicts a word for the person, where that was trained; only prompts with that word read it."""

    @property
    def trained(self) -> bool:
        """False for a plain IP-Adapter file, whose self-attention nobody taught to share; a training starts there."""
        return bool(self.lora) or any(copy is not None for pair in self.copies.values() for copy in pair)

    def check_fit(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise IncompatibleModelError unless the encoder was made for a UNet with these weights.

        Args:
            shapes: at least of the attentions' projections, by diffusers' names without ``.weight``.
        """
        blocks = {module.removesuffix(".attn2.to_k") for module in shapes if module.endswith(".attn2.to_k")}
        if blocks != self.adapter.keys():
            raise IncompatibleModelError(
                f"{self.name}: made for {len(self.adapter)} transformer blocks, this model has {len(blocks)}"
                f"{example(blocks ^ self.adapter.keys())}; use an SDXL model, and an encoder made for it"
            )
        wanted = {f"{block}.attn2.to_k": k.shape for block, (k, _) in self.adapter.items()}
        wanted |= {module: matrix_shape(delta) for module, delta in self.lora.items()}
        for block, pair in self.copies.items():
            wanted |= {f"{block}.attn1.to_k": matrix_shape(copy) for copy in pair if copy is not None}
        for module, shape in wanted.items():
            if tuple(shapes.get(module, ())) != tuple(shape):
                raise IncompatibleModelError(
                    f"{self.name}: made for a model whose {module} is {_said(shape)}, this model has "
                    f"{_said(shapes.get(module))}; use an SDXL model, and an encoder made for it"
                )


def encoder_tensors(encoder: LookaheadEncoder, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Tensors of the slim file, in ``dtype``; FormatError when it cannot hold a value."""
    tensors = {f"resampler.{key}": value for key, value in encoder.resampler.state_dict().items()}
    for block, pair in encoder.adapter.items():
        tensors |= {f"adapter.{block}.{which}.weight": weight for which, weight in zip(("to_k", "to_v"), pair)}
    for module, delta in encoder.lora.items():
        tensors |= {f"lora.{module}.down": delta.down, f"lora.{module}.up": delta.up * delta.scale}
    for block, pair in encoder.copies.items():
        for which, copy in zip(("to_k", "to_v"), pair):
            stem = f"copies.{block}.{which}"
            if isinstance(copy, LowRankDelta):
                tensors |= {f"{stem}.down": copy.down, f"{stem}.up": copy.up * copy.scale}
            elif copy is not None:
                tensors[f"{stem}.weight"] = copy
    if encoder.word is not None:
        tensors |= {f"{PREFIX}{key}": value for key, value in encoder.word.state_dict().items()}
    tensors = {key: tensor.detach().to("cpu", dtype) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FormatError(
                f"{encoder.name}: {key} has values that {str(dtype).removeprefix('torch.')} cannot hold; save it in "
                "float32"
            )
    return tensors


def write_encoder(
    path: Path,
    encoder: LookaheadEncoder,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> Path:
    """Write the slim file, complete or not at all; errors as write_safetensors and encoder_tensors."""
    tensors = encoder_tensors(encoder, dtype)
    return write_safetensors(path, tensors, dict(metadata) | {FORMAT_KEY: FORMAT}, overwrite=overwrite)


def read_encoder(path: Path, blocks: Sequence[str] | None = None) -> LookaheadEncoder:
    """Read a slim file, the authors' model_ckpt.pt, or an ip-adapter-plus(-face) file; on the CPU, in its own dtype.

    Of the authors' gigabytes only what training changed is taken into memory.

    Args:
        blocks: transformer blocks of the UNet at hand in the order of diffusers' modules, for an ip-adapter file
            of a UNet other than SDXL's: such files only number their layers.

    Raises:
        FormatError: the file is damaged, or something else.
        IncompatibleModelError: an ip-adapter file for another UNet.
    """
    path = Path(path)
    tensors, metadata = map_weights(path)
    if any(authors_file.MARK in key for key in tensors):
        checkpoint = authors_file.sort_checkpoint(tensors, path.name)
        tensors = checkpoint.trained()
        for block in checkpoint.blocks:
            tensors |= checkpoint.copies(block)
    elif any(key.startswith(ip_adapter_file.MARK) for key in tensors):
        tensors = ip_adapter_file.slim_names(tensors, path.name, blocks)
    elif metadata.get(FORMAT_KEY) != FORMAT:
        raise FormatError(
            f"{path.name}: found {len(tensors)} tensors of something else{example(tensors)}; expected a lookahead "
            "encoder, the authors' model_ckpt.pt or an ip-adapter-plus file for SDXL"
        )
    word = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    parts = read_parts({key: tensor for key, tensor in tensors.items() if key not in word}, path.name)
    head = WordHead.from_tensors(word, path.name) if word else None
    return LookaheadEncoder(*parts, path.name, metadata, head)


def _said(shape: Sequence[int] | None) -> str:
    return "nothing of that name" if shape is None else "×".join(map(str, shape))
