"""Settings of estimating a covariance."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from ...models.errors import ConfigError
from ..config import Precision, check_type
from ..settings import BaseSettings, OutputSettings


@dataclass(frozen=True, kw_only=True)
class CovarianceConfig:
    """How captions are read and encoded. Number and batch default to the authors' (data/estimate_C_inv.py)."""

    captions: int = 100_000
    """Most captions to read; 0 reads the whole file."""
    batch_size: int = 32
    """Captions per forward pass of the text encoders."""
    precision: Precision = "fp32"
    """Type of the text encoders. The sum is always kept in 64 bits."""
    save_every: int = 10_000
    """Captions after which the sum so far is written, to go on from; 0 writes it only when the work is cancelled."""
    resume: bool = True
    """Go on from such a sum where it is of the same file, model and settings."""

    def __post_init__(self) -> None:
        for field_name, kind in get_type_hints(type(self)).items():
            check_type(f"CovarianceConfig.{field_name}", getattr(self, field_name), kind)
        for name, least in (("captions", 0), ("batch_size", 1), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"CovarianceConfig.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CovarianceOutput(OutputSettings):
    """Where the covariance goes: below ``perfusion_covariances``."""

    kind = "perfusion_covariances"


@dataclass(frozen=True, kw_only=True)
class CovarianceRun:
    """A whole estimate from the command line."""

    base: BaseSettings
    captions: Path
    """Text file with one caption per line."""
    output: CovarianceOutput
    estimate: CovarianceConfig = field(default_factory=CovarianceConfig)
    device: str = ""
    """``cuda``, ``cpu`` or ``mps``; empty takes the best there is."""
