"""How alike pictures, words and faces are by their embeddings, and these scores as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError

MISSING = "–"


@dataclass(frozen=True)
class Score:
    """What one measure says of each picture."""

    name: str
    values: tuple[float | None, ...] = ()
    """Cosines in -1..1, one per picture; None for a picture that is left out. Empty: nothing was measured."""
    note: str = ""
    """Why nothing was measured, or what was left out."""

    @property
    def mean(self) -> float | None:
        """Over the pictures that were measured; None when none was."""
        found = [value for value in self.values if value is not None]
        return sum(found) / len(found) if found else None


def mean_similarity(made: Tensor, real: Tensor) -> Tensor:
    """Cosine of each made picture's embedding with the real ones', averaged over these.

    The mean of the result is over all pairs: CLIP-I, or DINO, of DreamBooth (arXiv 2208.12242).

    Args:
        made: (made, dim).
        real: (real, dim).

    Returns:
        (made,), float32.
    """
    _require_widths(made, real)
    return (F.normalize(made.float(), dim=1) @ F.normalize(real.float(), dim=1).T).mean(1)


def matched_similarity(pictures: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each picture's embedding with its own prompt's; the mean of the result is CLIP-T.

    Args:
        pictures: (pictures, dim).
        texts: (pictures, dim), or (1, dim) for one prompt of all.

    Returns:
        (pictures,), float32.
    """
    _require_widths(pictures, texts)
    if len(texts) not in (1, len(pictures)):
        raise ConfigError(
            f"found {len(texts)} prompts for {len(pictures)} pictures; give one prompt for all, or one for each"
        )
    return F.cosine_similarity(pictures.float(), texts.float(), dim=1)


def score_table(scores: Sequence[Score], count: int) -> str:
    """The scores of ``count`` pictures as a Markdown table: a row for each picture, the means, and the notes below."""
    rows = [["image", *(score.name for score in scores)], ["---:"] * (len(scores) + 1)]
    for place in range(count):
        values = [score.values[place] if score.values else None for score in scores]
        rows.append([str(place + 1), *(MISSING if value is None else f"{value:.4f}" for value in values)])
    means = ["not measured" if score.mean is None else f"{score.mean:.4f}" for score in scores]
    rows.append(["mean", *means])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"- {score.name}: {score.note}" for score in scores if score.note]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _require_widths(first: Tensor, second: Tensor) -> None:
    if first.shape[1] != second.shape[1]:
        raise ConfigError(
            f"embeddings of {first.shape[1]} and of {second.shape[1]} numbers cannot be compared; take both from one "
            "model"
        )
