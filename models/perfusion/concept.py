"""A trained concept: all that is kept of a training, its file, and several concepts together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, IncompatibleModelError
from ..formats import FORMAT_KEY, describe, read_safetensors, stored_tokens, write_safetensors
from ..learned_embeddings import BUNDLE, LearnedEmbedding, embeddings_from_tensors
from ..tokens import LearnedToken, check_distinct, plain_name
from .authors_file import read_checkpoint
from .concept_parts import OUTPUT, VALUE, ConceptParts, checked_parts
from .edit import EditSpace, Target

FORMAT = "perfusion-concept/1"
COVARIANCE_KEY = "personalize.covariance"


@dataclass(frozen=True)
class Concept:
    """A word, its place among text encodings, and what each layer answers to it.

    The covariance itself is not needed any more: an edit asks for C⁻¹ i* alone.
    """

    embedding: LearnedEmbedding
    """The word and its rows in the text encoders' tables."""
    superclass: str
    """The word that it stands in for, such as ``teddy``; '' when the file does not say."""
    parts: ConceptParts
    covariance: str
    """Fingerprint of the covariance it was trained with."""
    family: str | None
    """Name from models.families; None when the file does not say."""
    name: str
    """File name, for messages."""
    metadata: dict[str, str]

    @property
    def trigger(self) -> str:
        return self.embedding.trigger

    def target(self, beta: float, tau: float, gated_removal: bool = False) -> Target:
        """Its place among the encodings, with a gate."""
        return Target(self.parts.target_input, self.parts.dual, beta, tau, gated_removal)

    def target_output(self, module: str, project: Callable[[Tensor], Tensor]) -> Tensor:
        """What one projection answers to the concept, (1 or positions, out).

        Args:
            module: ``<block>.attn2.to_k`` or ``.to_v``, by diffusers' names.
            project: that projection, (rows, dim) -> (rows, out); a key projection's answer is that to the superclass.
        """
        if module in self.parts.outputs:
            return self.parts.outputs[module]
        return project(self.parts.superclass_input)

    def check_fit(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise IncompatibleModelError unless the concept was trained on a UNet with these weights.

        Args:
            shapes: at least of cross-attention's projections, by diffusers' names without ``.weight``.
        """
        found = {module for module in shapes if module.endswith(VALUE)}
        wanted = {module: len(rows[0]) for module, rows in self.parts.outputs.items()}
        values = {module for module in wanted if module.endswith(VALUE)}
        if found != values:
            raise IncompatibleModelError(
                f"{self.name}: trained on a model with {len(values)} cross-attention layers, this one has "
                f"{len(found)} (such as {min(found ^ values)}); use the model family that it was trained on"
            )
        width = len(self.parts.target_input)
        for module, out in wanted.items():
            if tuple(shapes.get(module, ())) != (out, width):
                raise IncompatibleModelError(
                    f"{self.name}: trained on a model whose {module} is {(out, width)}, this model has "
                    f"{tuple(shapes.get(module, ()))}; use the model family that it was trained on"
                )


def edit_space(
    concepts: Sequence[Concept],
    betas: Sequence[float],
    taus: Sequence[float],
    gated_removal: Sequence[bool] | None = None,
) -> EditSpace:
    """The edit of several concepts at once; their order does not matter.

    Args:
        betas, taus, gated_removal: one per concept, as in Target; None is the paper's removal for all.

    Raises:
        ConfigError: a word used twice, or a gate that is none.
        IncompatibleModelError: concepts measured with different covariances, which cannot be compared.
    """
    if not len(concepts) == len(betas) == len(taus):
        raise ConfigError(f"{len(concepts)} concepts have {len(betas)} betas and {len(taus)} taus; give each its own")
    check_distinct([LearnedToken(concept.trigger) for concept in concepts])
    for concept in concepts[1:]:
        if concept.covariance != concepts[0].covariance:
            raise IncompatibleModelError(
                f"{concepts[0].name} and {concept.name} were trained with different covariances "
                f"({concepts[0].covariance} and {concept.covariance}); train them with the same covariance file"
            )
    gated_removal = gated_removal or [False] * len(concepts)
    return EditSpace([concept.target(*gate) for concept, *gate in zip(concepts, betas, taus, gated_removal)])


def concept_tensors(concept: Concept, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Tensors of the file, all but the two directions in ``dtype``; FormatError when it cannot hold a value.

    Gates divide by the temperature what the directions measure, so these keep float32.
    """
    tensors = {f"{OUTPUT}{module}": rows for module, rows in concept.parts.outputs.items()}
    if concept.parts.superclass_input is not None:
        tensors["superclass_input"] = concept.parts.superclass_input
    stem = f"{BUNDLE}{plain_name(concept.trigger)}"
    tensors |= {f"{stem}.{encoder}": rows for encoder, rows in concept.embedding.rows.items()}
    tensors = {key: tensor.detach().to("cpu", dtype) for key, tensor in tensors.items()}
    tensors |= {
        "target_input": concept.parts.target_input.detach().to("cpu", torch.float32),
        "target_input_dual": concept.parts.dual.detach().to("cpu", torch.float32),
    }
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FormatError(
                f"{concept.name}: {key} has values that {str(tensor.dtype).removeprefix('torch.')} cannot hold; "
                "train with a lower learning rate, or save it in float32"
            )
    return tensors


def write_concept(
    path: Path,
    concept: Concept,
    *,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> Path:
    """Write a concept that read_concept reads.

    Args:
        config: training settings, stored as JSON.
        extra: further metadata, such as the workflow that made the file.

    Raises:
        ConfigError: the concept's family is unknown. Otherwise as concept_tensors and write_safetensors.
    """
    if concept.family is None:
        raise ConfigError(f"{concept.name}: the model family is unknown; say which one the concept was trained on")
    rows = {len(rows) for rows in concept.embedding.rows.values()}
    metadata = describe(
        FORMAT,
        family=concept.family,
        method="perfusion",
        title=Path(path).stem,
        tokens=[LearnedToken(concept.trigger, concept.superclass, max(rows))],
        config=config,
        kind="perfusion-concept",
        extra={COVARIANCE_KEY: concept.covariance} | dict(extra or {}),
    )
    return write_safetensors(path, concept_tensors(concept, dtype), metadata, overwrite=overwrite)


def read_concept(path: Path, trigger: str = "", *, layers_per_block: int = 2) -> Concept:
    """Read a concept of ours or the authors' .ckpt; on the CPU, in float32.

    Args:
        trigger: word to use instead of the file's. The authors' files all say ``*``, so these are called by their
            own name: cat.ckpt is ``<cat>``.
        layers_per_block: of the UNet that an authors' file was trained on, 2 for every published one.

    Raises:
        FormatError: the file is damaged, or something else.
    """
    path = Path(path)
    if path.suffix.lower() in {".ckpt", ".pt", ".pth", ".bin"}:
        checkpoint = read_checkpoint(path, trigger, layers_per_block)
        covariance = checkpoint.covariance.fingerprint
        return Concept(
            checkpoint.embedding, checkpoint.superclass, checkpoint.parts, covariance, checkpoint.family, path.name, {}
        )
    tensors, metadata = read_safetensors(path)
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise FormatError(
            f"{path.name}: found {metadata.get(FORMAT_KEY) or 'a file of another tool'}, expected {FORMAT} or the "
            "authors' .ckpt; choose a Perfusion concept"
        )
    bundled = {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLE)}
    parts = checked_parts({key: tensor for key, tensor in tensors.items() if key not in bundled}, path.name)
    tokens = stored_tokens(metadata)
    if len(tokens) != 1 or not bundled or not metadata.get(COVARIANCE_KEY):
        raise FormatError(
            f"{path.name}: names {len(tokens)} words and {metadata.get(COVARIANCE_KEY, 'no')} covariance, expected one "
            "of each with its embedding; the file is damaged, download it again"
        )
    embeddings = embeddings_from_tensors(path, bundled, metadata, [trigger] if trigger else [])
    if len(embeddings) != 1:
        raise FormatError(f"{path.name}: holds {len(embeddings)} words, expected one; download it again")
    return Concept(
        embeddings[0],
        tokens[0].initializer,
        parts,
        metadata[COVARIANCE_KEY],
        metadata.get("personalize.family"),
        path.name,
        metadata,
    )
