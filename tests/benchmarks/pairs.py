"""Timing two ways of doing the same work, in turn, so that a drifting machine cannot favour one."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Medians in seconds, and the median of the ratios of neighbouring runs."""

    ours: float
    theirs: float
    ratio: float
    """theirs / ours: above 1 means that ours is faster."""
    spread: tuple[float, float]
    """Smallest and largest of those ratios, without the outer tenth on either side."""


def time_pairs(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    warmup: int = 2,
    synchronize: Callable[[], object] = lambda: None,
) -> Pair:
    """Run ours and theirs alternately, swapping who goes first, after ``warmup`` uncounted rounds."""
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for number in range(warmup + rounds):
        for work in (ours, theirs) if number % 2 else (theirs, ours):
            synchronize()
            started = time.perf_counter()
            work()
            synchronize()
            if number >= warmup:
                times[work].append(time.perf_counter() - started)
    ratios = sorted(b / a for a, b in zip(times[ours], times[theirs], strict=True))
    cut = len(ratios) // 10
    kept = ratios[cut : len(ratios) - cut]
    return Pair(
        statistics.median(times[ours]), statistics.median(times[theirs]), statistics.median(ratios), (kept[0], kept[-1])
    )
