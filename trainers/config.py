"""Training settings: typed, checked at construction, read from TOML files, dictionaries and key=value words."""

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..models.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Optimizer = Literal["adamw", "adamw8bit"]
Crop = Literal["center", "random"]
Keep = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that every recipe shares."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 1
    """Pictures per forward pass and process."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step; their gradients are averaged."""
    learning_rate: float = 5e-5
    """Peak rate of the UNet's trained weights."""
    scale_learning_rate: bool = False
    """Multiply the rate by batch size, accumulation and number of processes."""
    lr_schedule: Schedule = "constant"
    """How the rate changes over the run."""
    warmup_steps: int = 0
    """Steps over which the rate rises from zero; ``constant`` ignores them."""
    lr_cycles: int = 1
    """Restarts of ``cosine_with_restarts``."""
    lr_power: float = 1.0
    """Exponent of ``polynomial``."""
    optimizer: Optimizer = "adamw"
    """``adamw8bit`` keeps the optimizer's state in 8 bits; it needs bitsandbytes and a GPU."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """The gradients' common norm is clipped to this; 0 turns clipping off."""
    precision: Precision = "auto"
    """Type of the frozen weights and of the forward pass; what is trained stays in fp32. ``auto``: bf16 or fp16 on a
    GPU, fp32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, about a third slower."""
    seed: int = 0
    """Fixes the order of pictures, crops, noise, timesteps and starting weights."""
    resolution: int = 0
    """Side of the square training pictures in pixels, a multiple of 8; 0 takes the base model's own."""
    crop: Crop = "center"
    """Which square of a picture is used; ``random`` caches several squares per picture."""
    crop_variants: int = 4
    """Squares per picture when ``crop`` is random."""
    flip: bool = False
    """Also train on mirrored pictures; wrong for lettering and asymmetric subjects."""
    offset_noise: float = 0.0
    """Random shift of the noise per channel; 0.1 lets solid colours be learned."""
    snr_gamma: float = 0.0
    """Min-SNR loss weighting; 5 is usual, 0 turns it off."""
    keep: Keep = "last"
    """Which weights are saved at the end: the last ones, or those with the lowest smoothed loss or, where a stopping
    rule evaluates, the best evaluation."""
    save_precision: Literal["fp16", "fp32"] = "fp16"
    """Type of the saved LoRA; learned tokens are always saved in fp32."""
    bundle_tokens: bool = False
    """Also put the learned tokens into the LoRA file, so that one file is enough; diffusers refuses such files."""
    checkpoint_every: int = 500
    """Write the whole training state every so many steps, to resume from; 0 writes it only at a cancel or failure."""
    checkpoint_limit: int = 2
    """How many training states are kept; older ones are deleted."""
    resume: bool = False
    """Continue from the newest training state of the same run, if there is one."""
    preview_every: int = 0
    """Sample a preview picture every so many steps; 0 makes none."""
    preview_prompt: str = ""
    """Prompt of the previews; empty takes the first caption."""
    preview_steps: int = 15
    """Sampling steps of a preview."""
    preview_guidance: float = 5.0
    """Classifier-free guidance scale of a preview."""

    def __post_init__(self) -> None:
        for field, kind in get_type_hints(type(self)).items():
            check_type(f"{type(self).__name__}.{field}", getattr(self, field), kind)
        for name in ("steps", "batch_size", "gradient_accumulation", "crop_variants", "preview_steps", "lr_cycles"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "adam_epsilon"):
            self._require(getattr(self, name) > 0, name, "positive")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "from 0 up to, not including, 1")
        for name in (
            "warmup_steps", "weight_decay", "max_grad_norm", "offset_noise", "snr_gamma", "checkpoint_every",
            "preview_every", "preview_guidance", "lr_power",
        ):  # fmt: skip
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(self.checkpoint_limit >= 1, "checkpoint_limit", "at least 1")
        self._require(0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1")
        self._require(
            self.resolution == 0 or (self.resolution >= 64 and self.resolution % 8 == 0),
            "resolution",
            "a multiple of 8 of at least 64, or 0 for the base model's own",
        )

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name} must be {expected}, got {getattr(self, name)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Every setting, fit for JSON; stored in the files that training writes."""
        return dataclasses.asdict(self)

    def resume_fingerprint(self, steps: int, *more: str) -> str:
        """Identity of everything that decides the course of training.

        Equal fingerprints mean that a checkpoint of one run continues the other exactly. What a run previews and
        how often it saves do not take part, nor its length, unless the schedule depends on it.

        Args:
            steps: length of the run.
            more: identities of base model, pictures and whatever else takes part.
        """
        ignored = {
            "steps", "checkpoint_every", "checkpoint_limit", "resume", "keep", "save_precision", "bundle_tokens",
            "preview_every", "preview_prompt", "preview_steps", "preview_guidance", "gradient_checkpointing",
        }  # fmt: skip
        settings = {name: value for name, value in self.as_dict().items() if name not in ignored}
        length = None if self.lr_schedule in {"constant", "constant_with_warmup"} else steps
        text = json.dumps([type(self).__name__, settings, length, *more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless ``value`` is of the annotated type; integers pass for floats."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
        return
    plain = get_origin(kind) or kind
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return
    if plain is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    if plain in (bool, int, float, str, Path):
        wrong_bool = plain is not bool and isinstance(value, bool)
        if wrong_bool or not isinstance(value, plain):
            raise ConfigError(f"{name} must be of type {plain.__name__}, got {value!r}")


def build(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Construct a (nested) config dataclass from plain values; unknown keys raise ConfigError."""
    types = get_type_hints(cls)
    table = where.rstrip(".") or cls.__name__
    if unknown := sorted(values.keys() - types.keys()):
        raise ConfigError(f"unknown setting(s) {', '.join(unknown)} in {table}; known: {', '.join(types)}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{table} lacks {', '.join(missing)}; add it to the config file or write key=value")
    return cls(**{name: _convert(types[name], value, f"{where}{name}.") for name, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        kinds = [kind for kind in get_args(kind) if kind is not type(None)]
        if value is None:
            return None
        return _convert(kinds[0], value, where) if len(kinds) == 1 else _build_ruled(kinds, value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{where[:-1]} must be a list, got {value!r}")
        return tuple(_convert(get_args(kind)[0], item, where) for item in value)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where[:-1]} must be a table of settings, got {value!r}")
        return build(kind, value, where)
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    check_type(where[:-1], value, kind)
    return value


def _build_ruled(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """The one of several config classes whose ``rule`` a table names; the first where it names none."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where[:-1]} must be a table of settings, got {value!r}")
    named = {kind.rule: kind for kind in kinds}
    name = value.get("rule", kinds[0].rule)
    if name not in named:
        raise ConfigError(f"{where}rule must be one of {', '.join(named)}, got {name!r}")
    return build(named[name], {key: setting for key, setting in value.items() if key != "rule"}, where)


def read_toml(path: Path) -> dict[str, Any]:
    """Values of a TOML file; ConfigError when it is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} could not be read ({error.strerror}); check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML ({error})") from error


def apply_overrides(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with ``section.key=value`` words applied; values are read as TOML, else as text."""
    result = json.loads(json.dumps(values, default=str))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not an override; write key=value, such as train.steps=500")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if not isinstance(value, (bool, int, float, str, list, dict)):
            value = text  # a name that reads like a date
        *tables, name = key.split(".")
        place = result
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key!r} goes through {table!r}, which is a single setting and not a table")
        place[name] = value
    return result
