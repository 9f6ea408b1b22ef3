"""The files a training leaves: a LoRA that carries its learned tokens, and the tokens as embedding files."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.errors import ConfigError, FormatError
from ..models.families import Family
from ..models.formats import LAYERS_KEY, describe, safe_name, write_safetensors
from ..models.lora import LowRankDelta, kohya_tensors
from ..models.tokens import LearnedToken, embedding_stems, plain_name
from .config import TrainConfig

LORA_FORMAT = "lora/1"
EMBEDDING_FORMAT = "embedding/1"


@dataclass(frozen=True)
class OutputPlace:
    """Where a training saves: one name, in the LoRA folder and in the embeddings folder."""

    name: str
    lora_folder: Path
    """Of a LoRA, or of a concept for the recipes that train one."""
    embedding_folder: Path
    run_folder: Path
    """Log, previews and training states."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", safe_name(self.name))

    @property
    def lora_path(self) -> Path:
        return self.lora_folder / f"{self.name}.safetensors"

    def embedding_path(self, token: LearnedToken, tokens: Sequence[LearnedToken]) -> Path:
        """Named like the LoRA; with several tokens each file also carries its own."""
        stems = embedding_stems(self.name, [other.trigger for other in tokens])
        return self.embedding_folder / f"{stems[list(tokens).index(token)]}.safetensors"

    def check(self, tokens: Sequence[LearnedToken], *, main: bool = True, may_exist: bool = False) -> None:
        """Refuse what could not be saved after hours of training; called before anything is loaded.

        Args:
            main: whether a LoRA, or what else changes the UNet, is written besides the tokens.
            may_exist: permission to overwrite for a run that continues its own files.

        Raises:
            ConfigError: files would overwrite each other or, without permission, older ones.
            FormatError: a folder cannot be written to.
        """
        paths = {self.lora_path: "LoRA"} if main else {}
        for token in tokens:
            path = self.embedding_path(token, tokens)
            safe_name(path.stem)
            # Folders of many systems ignore case.
            taken = {other.name.lower(): owner for other, owner in paths.items() if other.parent == path.parent}
            if owner := taken.get(path.name.lower()):
                raise ConfigError(
                    f"token {token.trigger} would be saved as {path.name}, like the {owner}; rename the token"
                )
            paths[path] = f"token {token.trigger}"
        for path in () if self.overwrite or may_exist else paths:
            if path.exists():
                raise ConfigError(
                    f"{path.name} exists already in {path.parent.name}; choose another output name or turn on overwrite"
                )
        for folder in dict.fromkeys([*(path.parent for path in paths), self.run_folder]):
            _check_writable(folder)


def _check_writable(folder: Path) -> None:
    """Try to write, since permissions do not tell of read-only disks; the folder itself may not exist yet."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise FormatError(
            f"nothing can be saved in {folder} ({error.strerror}); free space or choose a writable folder"
        ) from error


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, or as it is when a diverged training made values that ``dtype`` cannot hold."""
    narrow = tensor.to(dtype)
    return narrow if narrow.isfinite().all() else tensor


def save_personalization(
    place: OutputPlace,
    deltas: Mapping[str, LowRankDelta],
    rows: Mapping[str, Tensor],
    tokens: Sequence[LearnedToken],
    *,
    family: Family,
    layers_per_block: int,
    method: str,
    config: TrainConfig,
    overwrite: bool = False,
    extra: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``<name>.safetensors`` to the LoRA folder and one file per token to the embeddings folder.

    The LoRA is in kohya's layout, which every loader reads. When asked to, it also bundles the tokens as
    ``bundle_emb.<token>.<encoder>`` for loaders that know bundles; diffusers refuses such files.

    Args:
        deltas: trained changes by diffusers' module names.
        rows: encoder key (``clip_l``, ``clip_g``, ``clip_h``) -> (all rows, dim), in the order of ``tokens``.
        layers_per_block: of the base's UNet.
        extra: further metadata, such as the workflow.

    Raises:
        ConfigError: a file exists and may not be overwritten.
        FormatError: the disk refused; files written before stay, none is half-written.
    """
    dtype = torch.float16 if config.save_precision == "fp16" else torch.float32
    tensors = kohya_tensors(deltas, family.name, layers_per_block=layers_per_block)
    tensors = {key: narrowed(tensor, dtype) for key, tensor in tensors.items()}
    ranks = {delta.rank for delta in deltas.values()}
    if config.bundle_tokens:
        for token, part in rows_of_tokens(rows, tokens):
            tensors |= {f"bundle_emb.{plain_name(token.trigger)}.{key}": value for key, value in part.items()}
    about = {"family": family.name, "method": method, "title": place.name, "config": config.as_dict(), "extra": extra}
    metadata = describe(LORA_FORMAT, tokens=tokens, **about) | {LAYERS_KEY: str(layers_per_block)}
    if ranks:
        metadata |= {"ss_network_dim": str(max(ranks)), "ss_network_module": "networks.lora"}
    path = write_safetensors(place.lora_path, tensors, metadata, overwrite=overwrite)
    return [path, *save_embeddings(place, rows, tokens, overwrite=overwrite, **about)]


def save_embeddings(
    place: OutputPlace,
    rows: Mapping[str, Tensor],
    tokens: Sequence[LearnedToken],
    *,
    overwrite: bool = False,
    **about: Any,
) -> list[Path]:
    """Write one file per token to the embeddings folder, as ComfyUI's own prompts read them.

    Args:
        rows, overwrite: as for save_personalization.
        about: further arguments of ``describe``.
    """
    written = []
    for token, part in rows_of_tokens(rows, tokens):
        metadata = describe(EMBEDDING_FORMAT, tokens=[token], kind="textual-inversion", **about)
        path = place.embedding_path(token, tokens)
        written.append(write_safetensors(path, part, metadata, overwrite=overwrite))
    return written


def rows_of_tokens(
    rows: Mapping[str, Tensor], tokens: Sequence[LearnedToken]
) -> Iterator[tuple[LearnedToken, dict[str, Tensor]]]:
    """Each token with its own rows by encoder key, float32 on the CPU."""
    first = 0
    for token in tokens:
        last = first + token.rows
        yield token, {key: table[first:last].detach().to("cpu", torch.float32) for key, table in rows.items()}
        first = last
