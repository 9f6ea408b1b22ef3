"""The authors' concept files: a Lightning checkpoint cut down to five entries (perfusion/perfusion.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..families import SD15, SD21
from ..formats import read_torch_file
from ..keys import sgm_to_diffusers
from ..learned_embeddings import ANY, LearnedEmbedding, as_trigger, trigger_of_file
from .concept_parts import OUTPUT, ConceptParts, checked_parts
from .covariance import Covariance, checked

_ENDING = ".target_output"
# The superclass word is an entry of OmegaConf's, and through its parents drags the whole training config along.
_CONFIG_CLASSES = (
    "omegaconf.listconfig.ListConfig",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
)
_FAMILIES = {768: SD15.name, 1024: SD21.name}


class _Inert:
    """Keeps what a pickle says of an object of some class, and runs nothing of that class."""

    def __new__(cls, *_args: object) -> "_Inert":
        return super().__new__(cls)


def _stand_in(path: str) -> type[_Inert]:
    module, name = path.rsplit(".", 1)
    return type(name, (_Inert,), {"__module__": module, "__qualname__": name})


_STAND_INS = [_stand_in(path) for path in _CONFIG_CLASSES]


@dataclass(frozen=True)
class AuthorsConcept:
    """What such a file holds, in our terms."""

    embedding: LearnedEmbedding
    superclass: str
    parts: ConceptParts
    covariance: Covariance
    family: str | None


def read_checkpoint(path: Path, trigger: str = "", layers_per_block: int = 2) -> AuthorsConcept:
    """Read one, with key target outputs as they are stored and C⁻¹ taken from the file itself.

    Args:
        trigger: word for the concept; by default the file's own name, since the files all say ``*``.
        layers_per_block: of the UNet, without which LDM's numbers for its layers mean nothing.
    """
    with torch.serialization.safe_globals(_STAND_INS):
        contents = read_torch_file(path)
    name = path.name
    target_input, inverse = (_tensor(contents, key, name) for key in ("target_input", "C_inv"))
    covariance = checked(inverse, name)
    if tuple(target_input.shape) != (covariance.width,):
        raise _refusal(name, f"target_input is {tuple(target_input.shape)} beside a C_inv of {covariance.width}")
    tensors = {"target_input": target_input, "target_input_dual": covariance.dual(target_input)}
    outputs = contents.get("target_output")
    if not isinstance(outputs, Mapping):
        raise _refusal(name, "target_output is missing")
    for key in outputs:
        if not isinstance(key, str) or not key.endswith(_ENDING):
            raise _refusal(name, f"target_output has an entry {key!r}")
        module = sgm_to_diffusers(key.removesuffix(_ENDING), layers_per_block)
        tensors[f"{OUTPUT}{module}"] = _tensor(outputs, key, name)
    parts = checked_parts(tensors, name)
    rows, superclass = _word(contents.get("embedding"), name)
    word = as_trigger(trigger) if trigger else trigger_of_file(path)
    return AuthorsConcept(
        LearnedEmbedding(word, {ANY: rows}), superclass, parts, covariance, _FAMILIES.get(covariance.width)
    )


def _word(embedding: Any, name: str) -> tuple[Tensor, str]:
    """Embedding rows (rows, dim) of the placeholder, and the superclass word."""
    if not isinstance(embedding, Mapping) or not hasattr(embedding.get("string_to_param"), "items"):
        raise _refusal(name, "embedding.string_to_param is missing")
    vectors = dict(embedding["string_to_param"].items())
    if len(vectors) != 1:
        raise _refusal(name, f"embedding holds {len(vectors)} words instead of one")
    (placeholder,) = vectors
    rows = _tensor(vectors, placeholder, name).detach().float()
    if rows.ndim != 2 or not rows.numel() or not rows.isfinite().all():
        raise _refusal(name, f"the word's embedding is {tuple(rows.shape)} or holds values that are no numbers")
    words = embedding.get("initializer_words")
    if isinstance(words, _Inert):
        words = [getattr(node, "_val", None) for node in getattr(words, "_content", None) or []]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _refusal(name, "initializer_words is no list of words")
    return rows, words[0] if words else ""


def _tensor(entries: Mapping[str, Any], key: str, name: str) -> Tensor:
    value = entries.get(key)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise _refusal(name, f"{key} is missing or no tensor of floats")
    return value


def _refusal(name: str, found: str) -> FormatError:
    return FormatError(f"{name}: {found}; expected a concept as the authors' Perfusion saves it, choose another file")
