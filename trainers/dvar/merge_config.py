"""Settings of merging Custom Diffusions."""

from dataclasses import dataclass
from pathlib import Path

from ..settings import BaseSettings
from .config import CustomDiffusionOutput


@dataclass(frozen=True, kw_only=True)
class ConceptSettings:
    """One concept to merge."""

    file: Path
    """A Custom Diffusion of ours, or the authors' delta.bin."""
    phrase: str = ""
    """What names it in prompts, such as <dog> dog; empty takes the file's word, and the class it was trained with."""


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """A whole merge from the command line."""

    base: BaseSettings
    concepts: tuple[ConceptSettings, ...]
    """Two or more, all trained on the base."""
    output: CustomDiffusionOutput
    captions: Path | None = None
    """Text file of ordinary captions, one a line, whose pictures are to change least; None takes built-in ones."""
    device: str = ""
    """``cuda``, ``cpu`` or ``mps``; empty takes the best there is."""
