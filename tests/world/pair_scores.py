"""Two taught things in one picture: whether each has its own looks, or the other's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scenes import Creature, Shape
from scorer import SLOTS, THING_HEADS, Reading, parts_of_creature
from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """Shares in 0..1 over pictures with one thing on the left and one on the right."""

    looks: float
    """Of what makes each thing that one, read right on its side; none where something else was read there."""
    bleeding: float
    """Things that were read in the other's colour."""
    both: float
    """Pictures in which both are what they are, in their own colours."""


def pair_scores_of(reading: Reading, left: Sequence[Creature | Shape], right: Sequence[Creature | Shape]) -> PairScores:
    """What was read in n pictures, against the things on their two sides."""
    shares, coloured, taken = [], [], []
    for slot, own, other in zip(SLOTS, (left, right), (right, left), strict=True):
        there = _is(reading, f"{slot}.what", [_kind(thing) for thing in own])
        hits = [
            torch.stack(
                [reading.indices(f"{slot}.{name}")[n] == THING_HEADS[name].index(value) for name, value in looks]
            )
            for n, looks in enumerate(looks_of(thing).items() for thing in own)
        ]
        shares.append(torch.stack([hit.float().mean() for hit in hits]) * there)
        coloured.append(there & _is(reading, f"{slot}.colour", [thing.colour for thing in own]))
        taken.append(_is(reading, f"{slot}.colour", [thing.colour for thing in other]))
    return PairScores(
        looks=torch.stack(shares).mean().item(),
        bleeding=torch.stack(taken).float().mean().item(),
        both=(coloured[0] & coloured[1]).float().mean().item(),
    )


def looks_of(thing: Creature | Shape) -> dict[str, object]:
    """What tells one thing from others of its kind, by the scorer's heads."""
    if isinstance(thing, Shape):
        return {"colour": thing.colour, "texture": thing.texture}
    return parts_of_creature(thing)


def _kind(thing: Creature | Shape) -> str:
    return thing.shape if isinstance(thing, Shape) else "creature"


def _is(reading: Reading, head: str, wanted: Sequence[str]) -> Tensor:
    classes = THING_HEADS[head.partition(".")[2]]
    return reading.indices(head) == torch.tensor([classes.index(value) for value in wanted])
