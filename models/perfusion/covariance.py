"""The uncentered covariance of text encodings, in whose inverse Perfusion measures how alike encodings are."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, IncompatibleModelError
from ..formats import FORMAT_KEY, read_safetensors, write_safetensors

FORMAT = "perfusion-covariance/1"
FAMILY_KEY = "personalize.family"
CAPTIONS_KEY = "personalize.captions"
_CONDITION = 1e-15  # times the width: what is smaller cannot be told from rounding in float64


@dataclass(frozen=True)
class Covariance:
    """C⁻¹ of one text encoder's captions. The edit is the same for any multiple of it."""

    inverse: Tensor
    """(dim, dim), float64."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return len(self.inverse)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the values in float32, in which the authors' concept files repeat them."""
        values = self.inverse.to("cpu", torch.float32).contiguous()
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]

    def dual(self, vector: Tensor) -> Tensor:
        """C⁻¹ i for one encoding i (dim,): float32, on its device; IncompatibleModelError for another width."""
        if tuple(vector.shape) != (self.width,):
            raise IncompatibleModelError(
                f"the covariance is of text encodings of width {self.width}, this one has the shape "
                f"{tuple(vector.shape)}; choose the covariance of the base model's family"
            )
        product = self.inverse @ vector.detach().to(self.inverse.device, torch.float64)
        return product.to(torch.float32).to(vector.device)

    def check_family(self, family: str) -> None:
        """Raise IncompatibleModelError when the file says that it is of another family than models.families' name."""
        stored = self.metadata.get(FAMILY_KEY, family)
        if stored != family:
            raise IncompatibleModelError(
                f"the covariance was estimated for {stored}, the base model is {family}; estimate one for {family}"
            )


class CovarianceEstimate:
    """Accumulates C = (1/captions) Σ e eᵀ over all token positions of all captions, in float64.

    The sum is divided by the number of captions and not of tokens, as in the authors' data/estimate_C_inv.py.
    """

    def __init__(self, width: int):
        """Args: width: of the encodings; memory is width² numbers of 8 bytes, however many captions come."""
        self.captions = self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64)

    def add(self, encodings: Tensor) -> None:
        """Take in a batch (captions, tokens, dim); ConfigError, and nothing taken in, when it cannot be used."""
        width = len(self._sum)
        if encodings.ndim != 3 or encodings.shape[-1] != width:
            raise ConfigError(
                f"encodings have the shape {tuple(encodings.shape)}, expected (captions, tokens, {width})"
            )
        device = "cpu" if encodings.device.type == "mps" else encodings.device  # which has no float64
        rows = encodings.detach().to(device, torch.float64).flatten(0, 1)
        batch = (rows.T @ rows).cpu()
        if not batch.isfinite().all():
            raise ConfigError("the text encoder returned values that are no numbers; run it in float32")
        self._sum += batch
        self.captions += len(encodings)
        self.tokens += len(rows)

    def state(self) -> tuple[Tensor, dict[str, int]]:
        """The sum so far, (dim, dim), and how many captions and tokens are in it; to be continued by ``restore``."""
        return self._sum, {"captions": self.captions, "tokens": self.tokens}

    def restore(self, total: Tensor, counts: Mapping[str, int]) -> None:
        """Go on from ``state``; ConfigError for a sum of another width."""
        if total.shape != self._sum.shape:
            raise ConfigError(f"a sum of the shape {tuple(total.shape)} is none of width {len(self._sum)}; start anew")
        self._sum = total.to("cpu", torch.float64, copy=True)
        self.captions, self.tokens = counts["captions"], counts["tokens"]

    def matrix(self) -> Tensor:
        """C, (dim, dim), float64."""
        if not self.captions:
            raise ConfigError("a covariance needs captions; give a file with one caption per line")
        return self._sum / self.captions

    def covariance(self, metadata: Mapping[str, str] | None = None) -> Covariance:
        """C⁻¹; ConfigError when there were too few captions to determine it."""
        matrix = self.matrix()
        spread = torch.linalg.eigvalsh(matrix)
        if not spread[0] > _CONDITION * len(matrix) * spread[-1]:
            raise ConfigError(
                f"{self.captions} captions with {self.tokens} tokens do not determine a covariance of width "
                f"{len(matrix)}; give more captions, and more different ones"
            )
        return Covariance(torch.linalg.inv(matrix), {CAPTIONS_KEY: str(self.captions)} | dict(metadata or {}))


def checked(inverse: Tensor, name: str, metadata: Mapping[str, str] | None = None) -> Covariance:
    """A covariance from a file's C⁻¹.

    Raises:
        FormatError: it is no square matrix of finite floats, not symmetric, or not positive definite.
    """
    problem = None
    if inverse.ndim != 2 or inverse.shape[0] != inverse.shape[1] or not len(inverse):
        problem = f"has the shape {tuple(inverse.shape)}, expected a square matrix"
    elif not inverse.is_floating_point() or inverse.element_size() < 4:
        problem = f"is of {inverse.dtype}, expected 32-bit or 64-bit floats"
    elif not inverse.isfinite().all():
        problem = "holds values that are no numbers"
    else:
        values = inverse.to("cpu", torch.float64)
        largest = values.abs().max()
        # Inverses are as asymmetric as their computation rounds.
        if (values - values.T).abs().max() > 1e-3 * largest:
            problem = "is not symmetric"
        else:
            rounding = torch.finfo(inverse.dtype).eps * len(values) * largest
            lifted = (values + values.T) / 2 + rounding * torch.eye(len(values), dtype=torch.float64)
            if not largest > 0 or torch.linalg.cholesky_ex(lifted).info:
                problem = "is not positive definite"
    if problem:
        raise FormatError(f"{name}: the inverse covariance {problem}; estimate it again, or download the file again")
    return Covariance(values.clone(), dict(metadata or {}))


def read_covariance(path: Path) -> Covariance:
    """Read a covariance of ours, or the authors' ``C_inv.npy``; FormatError as from ``checked``."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return checked(_read_npy(path), path.name)
    tensors, metadata = read_safetensors(path)
    if metadata.get(FORMAT_KEY) != FORMAT or "inverse" not in tensors:
        raise FormatError(
            f"{path.name}: found {metadata.get(FORMAT_KEY) or 'a file of another tool'}, expected {FORMAT} or the "
            "authors' C_inv.npy; choose a covariance file, or estimate one"
        )
    return checked(tensors["inverse"], path.name, metadata)


def _read_npy(path: Path) -> Tensor:
    try:
        # Mapped, because a damaged header may ask for any amount of memory.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            raise ValueError("no array of 32-bit or 64-bit floats")
        return torch.from_numpy(np.array(array, order="C"))
    except (OSError, ValueError, EOFError, OverflowError, TypeError, SyntaxError) as error:
        raise FormatError(
            f"{path.name}: could not be read as a matrix in NumPy's format ({error}); download it again"
        ) from error


def write_covariance(
    path: Path, covariance: Covariance, metadata: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> Path:
    """Write the file that read_covariance reads; errors as write_safetensors."""
    entries = covariance.metadata | dict(metadata or {}) | {FORMAT_KEY: FORMAT}
    return write_safetensors(path, {"inverse": covariance.inverse}, entries, overwrite=overwrite)
