"""The base model a training starts from: recognised from file headers, its parts loaded one at a time."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..models.errors import ConfigError, FormatError
from ..models.families import Family
from ..models.schedules import NoiseSchedule, PredictionType
from . import folder as diffusers_folder
from . import single_file
from .modules import Component, missing_weights_named
from .tokenizer import load_tokenizer
from .vae import Autoencoder, load_autoencoder
from .weights import Weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CHECKPOINT_SUFFIXES = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class TrainingBase:
    """A recognised SD1.5, SD2.1 or SDXL base. Nothing is in memory until one of the ``load_`` methods is called."""

    name: str
    """File or folder name."""
    family: Family
    schedule: NoiseSchedule
    unet: Component
    text_encoders: tuple[Component, ...]
    vae: Component
    tokenizer_folder: Path | None = None

    @property
    def prediction_type(self) -> PredictionType:
        return self.schedule.prediction_type

    @property
    def layers_per_block(self) -> int:
        """Residual blocks of each level of the UNet's way down; kohya's files number SDXL's layers by it."""
        return self.unet.config.get("layers_per_block", 2)

    @property
    def label(self) -> str:
        """For people: family, prediction type where unusual, and name."""
        velocity = " v-prediction" if self.prediction_type == "v_prediction" else ""
        return f"{self.family.label}{velocity} ({self.name})"

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights and conventions, whatever the files are called; reads about a megabyte of each."""
        hasher = hashlib.sha256(f"{self.family.name} {self.prediction_type}".encode())
        hasher.update(self.schedule.alphas_cumprod.numpy().tobytes())
        for paths in {component.weights.paths: None for component in (self.unet, *self.text_encoders, self.vae)}:
            hasher.update(Weights(paths, {}).digest().encode())
        return hasher.hexdigest()[:32]

    def load_unet(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """The UNet2DConditionModel, frozen and in evaluation mode."""
        return self.unet.load(dtype, device)

    def load_text_encoders(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> list[nn.Module]:
        """The CLIP text encoders in the family's order, frozen; SDXL's second carries the text projection."""
        return [component.load(dtype, device) for component in self.text_encoders]

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Autoencoder:
        """The autoencoder in float32; in bfloat16 when asked so on an accelerator, never in float16."""
        return load_autoencoder(self.vae, self.family, dtype, device)

    def tokenizer(self):
        """transformers' CLIPTokenizer: of the folder given, of the diffusers folder, or of an installed package."""
        return load_tokenizer(self.tokenizer_folder)

    def noise_schedule(self) -> NoiseSchedule:
        return self.schedule


def open_base(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: PredictionType | None = None,
) -> TrainingBase:
    """Recognise a base model by its headers, without reading its weights (a pickled .ckpt is read whole, once).

    Args:
        path: a single-file checkpoint, a diffusers folder, or a hub id such as ``org/model``, which is
            downloaded unless it was before.
        vae: another autoencoder, a file or a diffusers folder.
        tokenizer: folder with a CLIP tokenizer's files.
        prediction_type: overrides what the model says or what was guessed.

    Raises:
        FormatError: absent, damaged, truncated or unsafe file.
        IncompatibleModelError: another kind of model; the message names it.
        ConfigError: an unknown ``prediction_type``.
    """
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ConfigError(f"prediction_type is {prediction_type!r}; expected 'epsilon' or 'v_prediction'")
    location = Path(path)
    if not location.exists():
        location = _download(str(path))
    base = _open_folder(location, vae) if location.is_dir() else _open_file(location, vae)
    changes: dict[str, object] = {}
    if tokenizer is not None:
        changes["tokenizer_folder"] = Path(tokenizer)
    if prediction_type is not None:
        changes["schedule"] = NoiseSchedule(base.schedule.alphas_cumprod, prediction_type)
    return TrainingBase(**{**_fields(base), **changes})


def load_other_vae(path: str | Path, family: Family, dtype: torch.dtype, device: torch.device | str) -> Autoencoder:
    """An autoencoder besides a base's own, such as a TAESD for quick previews; errors as open_base.

    It may be a TAESD's decoder alone, which cannot encode.
    """
    return load_autoencoder(_open_vae(Path(path), family, decoder_alone=True), family, dtype, device)


def _fields(base: TrainingBase) -> dict[str, object]:
    return {name: getattr(base, name) for name in TrainingBase.__dataclass_fields__}


def _open_file(path: Path, vae: str | Path | None) -> TrainingBase:
    weights = Weights.open(path)
    with missing_weights_named(path.name):
        family = single_file.detect_family(weights)
        velocity = single_file.predicts_velocity(weights, family)
        return TrainingBase(
            name=path.name,
            family=family,
            schedule=NoiseSchedule.scaled_linear(
                "v_prediction" if velocity else "epsilon", zero_terminal_snr=velocity and "ztsnr" in weights.shapes
            ),
            unet=single_file.unet_component(weights, family),
            text_encoders=tuple(single_file.text_component(weights, family, slot) for slot in family.encoders),
            vae=single_file.vae_component(weights, family) if vae is None else _open_vae(Path(vae), family),
        )


def _open_folder(path: Path, vae: str | Path | None) -> TrainingBase:
    family = diffusers_folder.detect_folder_family(path)
    return TrainingBase(
        name=path.name,
        family=family,
        schedule=diffusers_folder.folder_schedule(path),
        unet=diffusers_folder.folder_unet(path),
        text_encoders=tuple(diffusers_folder.folder_text(path, family, i) for i in range(len(family.encoders))),
        vae=diffusers_folder.folder_vae(path) if vae is None else _open_vae(Path(vae), family),
        tokenizer_folder=path / "tokenizer" if (path / "tokenizer").is_dir() else None,
    )


def _open_vae(path: Path, family: Family, *, decoder_alone: bool = False) -> Component:
    if path.is_dir():
        return diffusers_folder.folder_vae(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such VAE file or folder; check the path")
    with missing_weights_named(path.name):
        return single_file.vae_component(Weights.open(path), family, decoder_alone=decoder_alone)


def _download(name: str) -> Path:
    """Folder of a hub model in the local cache, downloading only what its pipeline needs."""
    if Path(name).suffix.lower() in _CHECKPOINT_SUFFIXES or not _HUB_ID.fullmatch(name):
        raise FormatError(f"{name}: no such checkpoint or diffusers folder; check the path")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name))
    # A missing network, a missing model and a missing pipeline file arrive as these two types.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(
            f"{name}: neither a path nor a model that could be downloaded ({reason[:160]}); "
            "check the name and the connection, or give a local file"
        ) from error
