"""Training of a face encoder from pictures of people to one file, read from top to bottom."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...models.errors import ConfigError, IncompatibleModelError
from ...models.faces import face_analyser
from ...models.formats import describe, safe_name
from ...models.lookahead.encoder import FORMAT, LookaheadEncoder, write_encoder
from ...models.lora import parse_lora
from ..adapters import with_prefix_removed
from ..base import TrainingBase, load_other_vae, open_base
from ..checkpoint import GeneratorState, check_states
from ..clip_vision import load_clip_vision
from ..config import build
from ..devices import autocast, dtype_of, free_memory, is_out_of_memory, out_of_memory, reset_peak_memory, resolve
from ..loop import TrainResult, train_loop
from ..optimizer import ParameterGroup, check_optimizer
from ..outcome import Outcome, report
from ..output import OutputPlace
from ..progress import Cancelled, FollowerProgress, Progress, SilentProgress
from ..ranks import Ranks
from ..settings import pick_device
from ..text import PromptEncoder
from ..weights import Weights
from .batch import Batches, picture_row
from .config import LookaheadConfig, LookaheadModels, LookaheadRun
from .data import FaceData
from .identity_attention import IdentityAttention
from .iterations import Iterations
from .losses import Seen, make_losses
from .pictures import PictureReader
from .starting import start_encoder
from .step import denoise, look_ahead, noise_term, trained_parameters


def train(
    config: LookaheadConfig,
    base: TrainingBase,
    models: LookaheadModels,
    data: FaceData,
    place: OutputPlace,
    *,
    device: torch.device,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    metadata: Mapping[str, str] | None = None,
    before_loading: Callable[[], None] | None = None,
) -> Outcome:
    """Train an encoder on an SDXL base: denoising steps, and steps that look ahead to the picture.

    One frozen UNet serves as encoder, as denoiser and, under the LCM LoRA, for the preview. Prompts are encoded once
    and the text encoders leave; pictures are encoded when they are met. A cancelled run saves what it has learned and
    its whole state, and continues exactly when started again with ``resume``.

    Args:
        place: its LoRA folder receives the encoder.
        metadata: further entries for the saved file, such as the workflow.
        before_loading: called when everything that can be checked beforehand has been.

    Raises:
        PersonalizeError: any of its kinds, before a model is loaded where the cause can be known by then.
    """
    progress, ranks = progress or SilentProgress(), ranks or Ranks()
    if not ranks.is_writer:
        progress = FollowerProgress(progress)
    config = resolve(config, device)
    if not base.family.size_conditioning:
        raise IncompatibleModelError(f"{base.name}: found {base.family.label}, face encoders are for SDXL; choose one")
    models.check(config, crop_heads=data.settings.crop_heads)
    if config.lookahead_max_timestep > base.schedule.timesteps:
        raise ConfigError(
            f"lookahead_max_timestep is {config.lookahead_max_timestep}, the base has {base.schedule.timesteps} "
            "timesteps; lower it"
        )
    files = (models.start, models.lcm_lora, models.face_network)
    digests = [Weights((path,), {}).digest() for path in files if path is not None]
    fingerprint = config.resume_fingerprint(
        config.steps, base.fingerprint, data.fingerprint, *digests, str(models.preview_vae), str(ranks.count)
    )
    dtype = dtype_of(config.precision, device)
    resumed = check_states(place.run_folder, fingerprint, resume=config.resume, overwrite=place.overwrite)
    place.check((), may_exist=resumed)
    check_optimizer(config)
    tokenizer = base.tokenizer()
    if before_loading is not None:
        before_loading()
    reset_peak_memory(device)
    generator = torch.Generator().manual_seed(config.seed)
    faces = face_analyser(models.face_models) if models.face_models else None
    cancelled = False
    try:
        prompts = ["", *data.prompts()]
        progress.report(0, 1, "encoding prompts")
        text = PromptEncoder(base.family, base.load_text_encoders(dtype, device), tokenizer)
        embeds = text.encode_frozen(prompts)
        del text
        free_memory(device)
        if progress.cancelled():
            raise Cancelled
        vae = base.load_vae(torch.float32, device)
        decoder = load_other_vae(models.preview_vae, base.family, dtype, device) if models.preview_vae else vae
        reader = PictureReader(
            vae,
            load_clip_vision(models.clip_vision, dtype, device),
            side=config.resolution or base.family.resolution,
            crop=config.crop,
            faces=faces,
            crop_heads=data.settings.crop_heads,
            memory=config.cache_gigabytes,
        )
        losses = make_losses(config, models, reader.landmarks, device) if config.lookahead_every else {}
        unet = base.load_unet(dtype, device).requires_grad_(False)
        encoder = start_encoder(
            models.start, unet, lora_rank=config.lora_rank, copy_rank=config.copy_rank, generator=generator
        )
        _check_vision(reader, encoder, models)
        identity = _attach(unet, base, encoder, models, config)
        resampler = encoder.resampler.to(device, torch.float32)
    except Cancelled:
        cancelled = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, "while loading the models") from error
    if ranks.any(cancelled):
        return Outcome(TrainResult(stopped_by="cancelled"))
    own, adapter = trained_parameters(identity, resampler)
    if not config.train_adapter:
        for parameter in adapter.values():
            parameter.requires_grad_(False)
        adapter = {}
    schedule = base.noise_schedule()
    iterations = Iterations(config, data, generator, ranks)
    batches = Batches(config, data, reader, dict(zip(prompts, range(len(prompts)))), embeds, ranks, device)
    shown: list[Tensor] = []
    halves = {"ahead": False}

    def step() -> Tensor:
        turn = iterations.next()
        halves["ahead"] = turn.ahead
        batch = batches.make(turn, schedule.timesteps)
        with autocast(config.precision, device):
            denoised = denoise(
                identity,
                resampler,
                schedule,
                batch.rows,
                batch.timesteps,
                uniform=batch.uniform,
                kv_drop_chance=config.kv_drop_chance,
                dropped=batch.dropped,
                noisy_reference=config.noisy_reference,
                adapter_scale=config.adapter_scale,
                preview_scale=turn.strength if turn.ahead else 0.0,
            )
        if not turn.ahead:
            target = schedule.target(batch.rows.latents, batch.rows.noise, batch.timesteps)
            has_face = torch.tensor([float(points is not None) for points in batch.landmarks])
            return sum(
                term.weight * noise_term(term.name, denoised.prediction, target, has_face)
                for term in config.denoising_losses
            )
        _, pictures = look_ahead(
            schedule, denoised, batch.timesteps, lambda latents: decoder.decode(latents, clamp=False)
        )
        shown[:] = [batch.references, batch.targets, pictures.detach().cpu()]
        seen = Seen(pictures, batch.references.to(device), batch.landmarks, batch.prompts)
        return turn.strength * sum(weight * loss(seen) for weight, loss in losses.values())

    def clipped() -> list[nn.Parameter] | None:
        return [*own.values()] if config.clip == "authors" and not halves["ahead"] else None

    def preview(_: int) -> Image.Image | None:
        return picture_row(shown) if shown else None

    saved: list[Path] = []

    def save(finished: TrainResult) -> None:
        about = describe(
            FORMAT, family=base.family.name, method="lookahead", title=place.name, config=config.as_dict(),
            kind="lookahead-encoder", extra=metadata,
        )  # fmt: skip
        precision = torch.float16 if config.save_precision == "fp16" else torch.float32
        learned = replace(identity.encoder, resampler=resampler, name=place.name)
        path = write_encoder(place.lora_path, learned, about, dtype=precision, overwrite=place.overwrite or resumed)
        saved[:] = [path]

    groups = [
        ParameterGroup("encoder", own, config.learning_rate, config.weight_decay),
        ParameterGroup("adapter", adapter, config.adapter_learning_rate, config.weight_decay),
    ]
    result = train_loop(
        config,
        [group for group in groups if group.parameters],
        step,
        device=device,
        state={"generator": GeneratorState(generator), "iterations": iterations},
        clip_only=clipped,
        progress=progress,
        ranks=ranks,
        run_folder=place.run_folder,
        fingerprint=fingerprint,
        preview=preview,
        save=save,
    )
    return Outcome(result, tuple(saved), preview(0))


def _check_vision(reader: PictureReader, encoder: LookaheadEncoder, models: LookaheadModels) -> None:
    found, wanted = reader.nobody.shape[-1], encoder.resampler.picture_dim
    if found != wanted:
        raise IncompatibleModelError(
            f"{models.clip_vision.name} gives hidden states of {found} numbers, {encoder.name} reads {wanted}; choose "
            "the CLIP-Vision model that it was trained with (1280 means ViT-H)"
        )


def _attach(
    unet: nn.Module, base: TrainingBase, encoder: LookaheadEncoder, models: LookaheadModels, config: LookaheadConfig
) -> IdentityAttention:
    preview = {}
    if config.lookahead_every:
        tensors = Weights.open(models.lcm_lora)
        deltas = parse_lora(tensors.read(tensors.shapes), layers_per_block=base.layers_per_block)
        preview = with_prefix_removed(deltas, "unet")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    return IdentityAttention(unet, encoder, preview=preview, trainable=True)


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``lookahead`` recipe; values as in example.toml."""
    settings = build(LookaheadRun, values)
    device = ranks.device or pick_device(settings.device)
    data = settings.data.open()
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    out, name = settings.output.folder, safe_name(settings.output.name)
    place = OutputPlace(
        name, out / "lookahead_encoders", out / "embeddings", out / "runs" / name, overwrite=settings.output.overwrite
    )
    for one in data.sets:
        if one.missing and ranks.is_writer:
            print(f"{one.settings.folder}: {len(one.missing)} pictures of the metadata are not there and are left out")
    outcome = train(settings.train, base, settings.models, data, place, device=device, progress=progress, ranks=ranks)
    return report(outcome, ranks)
