"""The parts of a diffusers folder: UNet, text encoders and autoencoder with their own configuration files."""

from pathlib import Path

from ..models.errors import FormatError, IncompatibleModelError
from ..models.families import SD15, SD21, SDXL, Family
from ..models.schedules import NoiseSchedule
from .architecture import END_TOKEN
from .modules import Component, Tensors, without
from .single_file import modern_vae_names
from .weights import Weights, component_files, read_json

_MODEL, _TEXT = "diffusion_pytorch_model", "model"


def detect_folder_family(folder: Path) -> Family:
    """Family of a diffusers folder; IncompatibleModelError names what else was found."""
    pipeline = read_json(folder / "model_index.json").get("_class_name", "") if _has(folder, "model_index.json") else ""
    if not _has(folder, "unet/config.json"):
        raise _refuse(folder, f"a {pipeline or 'folder'} without a UNet")
    unet = read_json(folder / "unet" / "config.json")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if _has(folder, f"{name}/config.json")]
    if (channels := unet.get("in_channels", 4)) != 4:
        raise _refuse(folder, f"a {pipeline or 'model'} with {channels} input channels")
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise _refuse(folder, f"a {unet['_class_name']}")
    if not isinstance(layers := unet.get("layers_per_block", 2), int):
        raise _refuse(folder, f"a distilled UNet with {layers} layers in its levels")
    if unet.get("addition_embed_type") == "text_time":
        if encoders == ["text_encoder", "text_encoder_2"]:
            return SDXL
        raise _refuse(folder, "the SDXL refiner" if encoders == ["text_encoder_2"] else "a UNet without text encoders")
    if unet.get("class_embed_type") or unet.get("num_class_embeds") or unet.get("addition_embed_type"):
        raise _refuse(folder, f"a {pipeline or 'model'} conditioned on more than text")
    if encoders != ["text_encoder"]:
        raise _refuse(folder, f"a UNet with the text encoders {encoders}")
    width = read_json(folder / "text_encoder" / "config.json").get("hidden_size")
    if width != unet.get("cross_attention_dim"):
        raise _refuse(
            folder, f"a UNet for text of width {unet.get('cross_attention_dim')}, and a text encoder of {width}"
        )
    return SD21 if unet.get("use_linear_projection") else SD15


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _refuse(folder: Path, found: str) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"{folder.name}: found {found}; training needs a whole SD1.5, SD2.1 or SDXL text-to-image model"
    )


def folder_schedule(folder: Path) -> NoiseSchedule:
    """Noise levels and prediction type from ``scheduler/scheduler_config.json``; the usual ones without it."""
    path = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(path) if path.is_file() else {}
    prediction = settings.get("prediction_type", "epsilon")
    spacing = settings.get("beta_schedule", "scaled_linear")
    if prediction not in ("epsilon", "v_prediction") or spacing != "scaled_linear":
        raise IncompatibleModelError(
            f"{folder.name}: its scheduler predicts {prediction!r} on {spacing!r} noise levels; "
            "training knows 'epsilon' and 'v_prediction' on 'scaled_linear', choose another model"
        )
    return NoiseSchedule.scaled_linear(
        prediction,
        timesteps=settings.get("num_train_timesteps", 1000),
        beta_start=settings.get("beta_start", 0.00085),
        beta_end=settings.get("beta_end", 0.012),
        zero_terminal_snr=settings.get("rescale_betas_zero_snr", False),
    )


def folder_unet(folder: Path) -> Component:
    return _component(folder / "unet", "unet", _MODEL, lambda tensors: tensors)


def folder_text(folder: Path, family: Family, index: int) -> Component:
    """Text encoder ``index`` of the family; prompts with learned tokens need its true end token."""
    part = folder / ("text_encoder" if index == 0 else f"text_encoder_{index + 1}")
    kind = "text_projection" if family.size_conditioning and index == len(family.encoders) - 1 else "text"
    component = _component(part, kind, _TEXT, _with_prefix, legacy="pytorch_model.bin")
    component.config["eos_token_id"] = END_TOKEN  # old files say 2, which means: pool at the highest id
    return component


def _with_prefix(tensors: Tensors) -> Tensors:
    keep = ("text_model.", "text_projection.")
    return {name if name.startswith(keep) else f"text_model.{name}": tensor for name, tensor in tensors.items()}


def folder_vae(folder: Path) -> Component:
    """The autoencoder of a whole model's folder, or of a folder that is an autoencoder by itself."""
    part = folder / "vae" if (folder / "vae").is_dir() else folder
    if not _has(part, "config.json"):
        raise FormatError(f"{folder}: holds no autoencoder (VAE); choose a model that has one, or give a VAE beside it")
    kind = "tiny_vae" if read_json(part / "config.json").get("_class_name") == "AutoencoderTiny" else "vae"
    return _component(part, kind, _MODEL, modern_vae_names)


def _component(part: Path, kind: str, stem: str, convert, legacy: str | None = None) -> Component:
    config = {key: value for key, value in read_json(part / "config.json").items() if not key.startswith("_")}
    weights = Weights.open(*component_files(part, stem, legacy or f"{stem}.bin"))
    return Component(kind, config, weights, without(weights.shapes, "position_ids"), convert)
