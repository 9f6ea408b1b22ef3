"""What a training leaves, and how the command line ends."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .loop import TrainResult
from .ranks import Ranks

CANCELLED = 130
"""Exit status of a command that was cancelled, as shells count it."""


@dataclass(frozen=True)
class Outcome:
    """What a training leaves."""

    train: TrainResult
    files: tuple[Path, ...] = ()
    """What changes the UNet first, then one embedding file per learned token; empty when nothing was learned yet."""
    preview: Image.Image | None = None
    """The last preview."""


def report(outcome: Outcome, ranks: Ranks) -> int:
    """Say on the terminal what a training has come to; its exit status."""
    if ranks.is_writer:
        print(f"\n{outcome.train.summary}")
        for path in outcome.files:
            print(f"saved {path}")
    return CANCELLED if outcome.train.stopped_by == "cancelled" else 0
