"""What concepts are, and how they go together, as a text to read."""

import json
from collections.abc import Sequence

import torch

from ..families import FAMILIES
from ..learned_embeddings import ANY
from .concept import Concept, concept_tensors
from .concept_parts import VALUE

_TOLD = ("steps", "learning_rate", "batch_size", "gradient_accumulation", "beta", "tau", "masked_loss", "seed")
"""Settings of a training that the text repeats, in this order."""


def describe_concept(concept: Concept, beta: float, tau: float, gated_removal: bool = False) -> str:
    """A concept with its gate as a Markdown table of two columns."""
    values = {module: rows for module, rows in concept.parts.outputs.items() if module.endswith(VALUE)}
    widths = sorted({rows.shape[1] for rows in values.values()})
    positions = max(len(rows) for rows in values.values())
    words = {encoder: tuple(rows.shape) for encoder, rows in concept.embedding.rows.items()}
    vectors = ", ".join(
        f"{count} of {width}" + ("" if encoder == ANY else f" ({encoder})") for encoder, (count, width) in words.items()
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in concept_tensors(concept, torch.float32).values())
    gate = torch.sigmoid(torch.tensor((1 - beta) / tau)).item()
    facts = {
        "file": concept.name,
        "word": f"`{concept.trigger}`",
        "superclass": concept.superclass or "the file does not say",
        "model family": FAMILIES[concept.family].label if concept.family in FAMILIES else "the file does not say",
        "embedding vectors": vectors,
        "target input": f"{len(concept.parts.target_input)} numbers",
        "target outputs": f"{len(values)} layers, {' / '.join(map(str, widths))} wide, "
        + ("one for all positions (paper)" if positions == 1 else f"one for each of {positions} positions"),
        "keys": "the superclass's encoding, projected" if concept.parts.superclass_input is not None else "stored",
        "numbers": f"{size // 4:,}, {size / 2000:.0f} KB in fp16",
        "covariance": f"`{concept.covariance}`",
        "gate": f"beta {beta:g}, tau {tau:g}: {gate:.0%} open for its own word"
        + ("; words lose its direction as far as it opens" if gated_removal else ""),
        "training": _training(concept),
    }
    return "\n".join(
        ["| concept | |", "| --- | --- |", *(f"| {name} | {_cell(fact)} |" for name, fact in facts.items())]
    )


def describe_company(concepts: Sequence[Concept]) -> str:
    """How alike concepts are, as Markdown: a row for each, in columns how much of the others its gate sees in it.

    i_aᵀ C⁻¹ i_c / i_cᵀ C⁻¹ i_c, the resemblance that a gate compares with its beta: 1 for the concept itself.
    Concepts of different covariances are named instead, since these cannot be used in one picture.
    """
    if len({concept.covariance for concept in concepts}) > 1:
        groups = ", ".join(f"`{concept.trigger}` with `{concept.covariance}`" for concept in concepts)
        return f"These cannot be used in one picture, because they were trained with different covariances: {groups}."
    if len({len(concept.parts.target_input) for concept in concepts}) > 1:
        return "These cannot be used in one picture, because they belong to different model families."
    words = [f"`{concept.trigger}`" for concept in concepts]
    rows = [["resemblance", *words], ["---", *["---:"] * len(words)]]
    for word, seen in zip(words, concepts):
        alike = [
            (seen.parts.target_input @ by.parts.dual / (by.parts.target_input @ by.parts.dual)).item()
            for by in concepts
        ]
        rows.append([word, *(f"{value:.2f}" for value in alike)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    """A text from a file, which may hold anything, in one cell."""
    return " ".join(text.replace("|", "/").split())


def _training(concept: Concept) -> str:
    try:
        config = json.loads(concept.metadata.get("personalize.config", "{}"))
        told = [f"{name} {config[name]}" for name in _TOLD if name in config]
    except (ValueError, TypeError, RecursionError):
        told = []
    return ", ".join(told) or "the file does not say"
