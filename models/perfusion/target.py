"""Target inputs and outputs: how the superclass starts them, and how training moves the input."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DatasetError

EMA_DECAY = 0.99

OutputMode = Literal["paper", "positions"]
"""Target outputs of a layer: one vector, as in the paper, or one for each of the prompt's token positions, as in the
authors' code; that is 77 times as large."""


def concept_row(ids: Sequence[int], token: int) -> int:
    """The row of a prompt's encoding that belongs to its first ``token``.

    Args:
        ids: the prompt's ids with the start token, which moves every word by one.
    """
    if token not in ids:
        raise DatasetError(
            "a caption does not contain the concept's token among the words that are read; write the token into every "
            "caption, near the beginning"
        )
    return list(ids).index(token)


def concept_encoding(encodings: Tensor, rows: Tensor) -> Tensor:
    """Mean over a batch of the encodings at the concept's rows; without gradient, float32.

    Args:
        encodings: (batch, tokens, dim).
        rows: from concept_row, (batch,).

    Returns:
        (dim,).
    """
    rows = rows.to(encodings.device)
    return encodings.detach().float()[torch.arange(len(encodings), device=rows.device), rows].mean(dim=0)


def moved_target_input(target_input: Tensor, encodings: Tensor, rows: Tensor, decay: float = EMA_DECAY) -> Tensor:
    """The target input after a micro-batch: decay · i* + (1 - decay) · the batch's mean encoding of the concept.

    The authors move it before the UNet runs, and in every micro-batch rather than in every optimizer step.

    Args:
        target_input: (dim,).
        encodings, rows: as for concept_encoding.
    """
    return decay * target_input + (1 - decay) * concept_encoding(encodings, rows).to(target_input)


def superclass_input(encodings: Tensor, rows: Tensor, mode: OutputMode) -> Tensor:
    """The input whose projections are a concept's first target outputs, and for keys the last ones too.

    Key locking: o* of a key projection is W times this and stays so; o* of a value projection starts so.

    Args:
        encodings: of the first batch's captions with the superclass word in the token's place, (batch, tokens, dim).
        rows: as for concept_encoding.
        mode: ``paper`` takes the concept's position, ``positions`` all of them; both average over the batch.

    Returns:
        (1, dim) or (tokens, dim), float32.
    """
    if mode == "paper":
        return concept_encoding(encodings, rows).unsqueeze(0)
    if mode == "positions":
        return encodings.detach().float().mean(dim=0)
    raise ConfigError(f"target outputs are stored in the mode 'paper' or 'positions', not {mode!r}")
