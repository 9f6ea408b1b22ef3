"""Training of a face encoder from pictures of people to one file, read from top to bottom."""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.errors import ConfigError, IncompatibleModelError
from ...models.formats import describe, safe_name
from ...models.lookahead.encoder import FORMAT, write_encoder
from ...models.lookahead.word import PREFIX
from ..base import TrainingBase, open_base
from ..checkpoint import GeneratorState, check_states
from ..config import build
from ..devices import dtype_of, is_out_of_memory, out_of_memory, reset_peak_memory, resolve
from ..loop import TrainResult, train_loop
from ..optimizer import ParameterGroup, check_optimizer
from ..outcome import Outcome, report
from ..output import OutputPlace
from ..progress import Cancelled, FollowerProgress, Progress, SilentProgress
from ..ranks import Ranks
from ..settings import pick_device
from .batch import Batches
from .config import LookaheadConfig, LookaheadModels, LookaheadRun
from .data import TARGET_WORD, FaceData
from .evaluation import EvaluateEvery, LookaheadEvaluation
from .iterations import Iterations
from .loading import load
from .losses import make_losses
from .objective import Objective
from .step import trained_parameters
from .validation import ValidationGrid


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
    if config.predict_word and not any(TARGET_WORD in prompt for prompt in data.prompts()):
        raise ConfigError(
            f"predict_word needs prompts with {TARGET_WORD}; read prompts from file names and set placeholder to "
            '"{placeholder}"'
        )
    fingerprint = config.resume_fingerprint(
        config.steps, base.fingerprint, data.fingerprint, models.fingerprint, str(ranks.count)
    )
    dtype_of(config.precision, device)
    resumed = check_states(place.run_folder, fingerprint, resume=config.resume, overwrite=place.overwrite)
    place.check((), may_exist=resumed)
    check_optimizer(config)
    base.tokenizer()  # refuses before a model is loaded
    if before_loading is not None:
        before_loading()
    reset_peak_memory(device)
    generator = torch.Generator().manual_seed(config.seed)
    cancelled = False
    try:
        loaded = load(
            config,
            base,
            models,
            data,
            prompts=_prompts(data),
            device=device,
            generator=generator,
            progress=progress,
            losses=lambda reader: make_losses(config, models, reader.landmarks, device),
        )
    except Cancelled:
        cancelled = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, "while loading the models") from error
    if ranks.any(cancelled):
        return Outcome(TrainResult(stopped_by="cancelled"))
    own, adapter = trained_parameters(loaded.identity, loaded.resampler)
    if not config.train_adapter:
        for parameter in adapter.values():
            parameter.requires_grad_(False)
        adapter = {}
    if loaded.head is not None:  # the authors leave it as it was drawn
        own |= {f"{PREFIX}{name}": parameter for name, parameter in loaded.head.named_parameters()}
    objective, iterations = Objective(config, loaded, device), Iterations(config, data, generator, ranks)
    batches = [
        Batches(config, one, loaded.reader, loaded.told, ranks, device) for one in (data, data.validation) if one
    ]
    halves = {"ahead": False}

    def step() -> Tensor:
        turn = iterations.next()
        halves["ahead"] = turn.ahead
        batch = batches[0].make(turn, loaded.schedule.timesteps)
        batches[0].expect(iterations.peek())
        return objective.ahead(batch, turn.strength) if turn.ahead else objective.denoising(batch)

    def clipped() -> list[nn.Parameter] | None:
        return [*own.values()] if config.clip == "authors" and not halves["ahead"] else None

    saved: list[Path] = []

    def save(finished: TrainResult) -> None:
        about = describe(
            FORMAT, family=base.family.name, method="lookahead", title=place.name, config=config.as_dict(),
            kind="lookahead-encoder", extra=_provenance(base, models, data) | dict(metadata or {}),
        )  # fmt: skip
        precision = torch.float16 if config.save_precision == "fp16" else torch.float32
        learned = replace(loaded.identity.encoder, resampler=loaded.resampler, name=place.name)
        if loaded.head is not None:
            learned = replace(learned, word=loaded.head)
        path = write_encoder(place.lora_path, learned, about, dtype=precision, overwrite=place.overwrite or resumed)
        saved[:] = [path]

    groups = [
        ParameterGroup("encoder", own, config.learning_rate, config.weight_decay),
        ParameterGroup("adapter", adapter, config.adapter_learning_rate, config.weight_decay),
    ]
    grid = ValidationGrid(config, data, loaded, batches, device=device, progress=progress)
    evaluation = None
    if config.evaluate_every:
        shown = data.validation or data
        evaluation = LookaheadEvaluation(config, objective, batches[-1], shown, loaded.schedule.timesteps)
    with closing(batches[0]):
        result = train_loop(
            config,
            [group for group in groups if group.parameters],
            step,
            device=device,
            state={"generator": GeneratorState(generator), "iterations": iterations},
            clip_only=clipped,
            stopping=EvaluateEvery(config.steps, config.evaluate_every) if evaluation else None,
            evaluation=evaluation,
            progress=progress,
            ranks=ranks,
            run_folder=place.run_folder,
            fingerprint=fingerprint,
            preview=grid.make,
            save=save,
        )
    result.explanation = "; ".join([*data.remarks(), *loaded.reader.remarks()])
    return Outcome(result, tuple(saved), grid.last)


def _prompts(data: FaceData) -> list[str]:
    """All that a training, its evaluations and its previews can ask for."""
    validation = data.validation.prompts() if data.validation else []
    return sorted({"", *data.prompts(), *validation, *data.settings.validation_prompts})


def _provenance(base: TrainingBase, models: LookaheadModels, data: FaceData) -> dict[str, str]:
    """What a file says of where it comes from, by names without paths."""
    sets = {one.settings.folder.name: len(one.pictures) for one in data.sets}
    return {
        "personalize.base": base.name,
        "personalize.started_from": models.start.name,
        "personalize.pictures": json.dumps(sets),
    }


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
    outcome = train(settings.train, base, settings.models, data, place, device=device, progress=progress, ranks=ranks)
    return report(outcome, ranks)
