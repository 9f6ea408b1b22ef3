"""Estimating the covariance of a base model's text encodings from a file of captions."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ...models.errors import ConfigError, DatasetError, FormatError
from ...models.formats import FORMAT_KEY, read_safetensors, write_safetensors
from ...models.perfusion import CovarianceEstimate, write_covariance
from ...models.perfusion.covariance import FAMILY_KEY
from ..base import TrainingBase, open_base
from ..config import build
from ..devices import dtype_of, is_out_of_memory, resolve_precision
from ..outcome import CANCELLED
from ..output import OutputPlace
from ..progress import Progress, SilentProgress
from ..ranks import Ranks
from ..settings import pick_device
from ..text import PromptEncoder
from .covariance_config import CovarianceConfig, CovarianceRun

STATE_FORMAT = "covariance-state/1"
STATE_NAME = "covariance-state.safetensors"
LONGEST_LINE = 65536
"""Bytes; no caption is as long, and a file without line ends would be read into memory whole."""


@dataclass(frozen=True)
class CovarianceResult:
    """What an estimate leaves."""

    captions: int
    """That went into it, those of an earlier, cancelled run included."""
    total: int
    """That there are to read."""
    file: Path | None = None
    """The covariance; None when the work was cancelled."""

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.file is None:
            return f"cancelled after {self.captions} of {self.total} captions; run it again to go on from there"
        return f"covariance of {self.captions} captions"


def estimate(
    config: CovarianceConfig,
    base: TrainingBase,
    captions: Path,
    place: OutputPlace,
    *,
    device: torch.device,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
    before_loading: Callable[[], None] | None = None,
) -> CovarianceResult:
    """Read captions line by line, encode them as training does, and write C⁻¹.

    Memory depends on the width of the encodings alone. Empty lines do not count. The sum so far lies in the place's
    run folder until the work is done.

    Args:
        captions: text file in UTF-8, one caption per line.
        place: its folder for LoRAs is that of the covariance.
        metadata: further entries for the file, such as the workflow.
        before_loading: called before the text encoders are loaded.

    Raises:
        DatasetError: the captions cannot be read.
        ConfigError: there are too few of them, or a file of that name exists.
        FormatError: the disk refuses.
    """
    progress = progress or SilentProgress()
    precision = resolve_precision(config.precision, device)
    dtype = dtype_of(precision, device)
    place.check(())
    digest, lines = _digest_of(captions)
    total = min(lines, config.captions) if config.captions else lines
    if not total:
        raise DatasetError(f"{captions.name}: holds no captions; give a file with one caption per line")
    fingerprint = hashlib.sha256(
        json.dumps([digest, base.fingerprint, precision, config.batch_size, config.captions]).encode()
    ).hexdigest()
    sums = CovarianceEstimate(base.unet.config["cross_attention_dim"])
    state = place.run_folder / STATE_NAME
    if config.resume:
        _restore(sums, state, fingerprint)
    if before_loading is not None:
        before_loading()
    encoder = PromptEncoder(base.family, base.load_text_encoders(dtype, device), base.tokenizer())
    saved = sums.captions
    progress.report(sums.captions, total, "encoding captions")
    try:
        lines = islice(_lines(captions), sums.captions, total)
        while batch := list(islice(lines, config.batch_size)):
            if progress.cancelled():
                _save(sums, state, fingerprint)
                return CovarianceResult(sums.captions, total)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="a caption has")  # long ones are cut, as the authors cut them
                sums.add(encoder.encode_frozen(batch, config.batch_size).embeds)
            progress.report(sums.captions, total, f"encoding captions · {sums.captions} of {total}")
            if config.save_every and sums.captions - saved >= config.save_every:
                _save(sums, state, fingerprint)
                saved = sums.captions
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory with {config.batch_size} captions at a time; lower the batch size") from error
    covariance = sums.covariance({FAMILY_KEY: base.family.name})
    path = write_covariance(place.lora_path, covariance, metadata, overwrite=place.overwrite)
    state.unlink(missing_ok=True)
    return CovarianceResult(sums.captions, total, path)


def _lines(path: Path) -> Iterator[str]:
    """Captions of a file; DatasetError when it is missing or no text."""
    try:
        with open(path, "rb") as file:
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise DatasetError(f"{path.name}: a line is longer than any caption; write one caption per line")
                if text := " ".join(line.decode("utf-8-sig").split()):
                    yield text
    except OSError as error:
        raise DatasetError(f"{path.name}: could not be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path.name}: is no text in UTF-8; save it as UTF-8, one caption per line") from error


def _digest_of(path: Path) -> tuple[str, int]:
    """SHA-256 of a file's captions, and how many there are."""
    hasher, count = hashlib.sha256(), 0
    for line in _lines(path):
        hasher.update(f"{line}\n".encode())
        count += 1
    return hasher.hexdigest(), count


def _save(sums: CovarianceEstimate, path: Path, fingerprint: str) -> None:
    total, counts = sums.state()
    entries = {FORMAT_KEY: STATE_FORMAT, "fingerprint": fingerprint, "counts": json.dumps(counts)}
    write_safetensors(path, {"sum": total}, entries, overwrite=True)


def _restore(sums: CovarianceEstimate, path: Path, fingerprint: str) -> None:
    """Go on from a sum of the same work; without one, or with a damaged one, the work starts anew."""
    try:
        tensors, metadata = read_safetensors(path) if path.is_file() else ({}, {})
    except FormatError:
        return
    if metadata.get("fingerprint") == fingerprint:
        sums.restore(tensors["sum"], json.loads(metadata["counts"]))


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``perfusion-covariance`` recipe; values as in covariance.example.toml."""
    settings = build(CovarianceRun, values)
    if ranks.count > 1:
        raise ConfigError("a covariance is estimated in one process; start it without accelerate launch")
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    result = estimate(
        settings.estimate,
        base,
        settings.captions,
        settings.output.place(),
        device=pick_device(settings.device),
        progress=progress,
    )
    print(f"\n{result.summary}")
    if result.file is None:
        return CANCELLED
    print(f"saved {result.file}")
    return 0
