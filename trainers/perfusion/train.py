"""Perfusion training from pictures to a concept file, read from top to bottom."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import ConfigError, IncompatibleModelError
from ...models.perfusion import Covariance, read_covariance, resize_mask, soft_mask, write_concept
from ...models.tokens import LearnedToken, replace_triggers
from ..base import TrainingBase, open_base
from ..batches import LatentBatch, LatentBatches
from ..cache import LatentCache
from ..checkpoint import GeneratorState, check_states
from ..conditioning import Conditioning
from ..config import build
from ..dataset import Dataset
from ..devices import autocast, dtype_of, free_memory, is_out_of_memory, out_of_memory, reset_peak_memory, resolve
from ..evaluation import Evaluation
from ..likeness import Likeness, PictureScore
from ..loop import TrainResult, train_loop
from ..optimizer import ParameterGroup, check_optimizer
from ..order import BatchOrder
from ..outcome import Outcome, report
from ..output import OutputPlace
from ..progress import Cancelled, FollowerProgress, Progress, SilentProgress
from ..ranks import Ranks
from ..settings import pick_device
from ..stopping import FixedSteps, StoppingRule
from ..text import check_tokens, refuse_cut_initializers
from .concept import TrainedConcept
from .config import NO_COVARIANCE, PerfusionConfig, PerfusionRun
from .evaluation import FixedLoss
from .preview import Previews
from .prompts import Prompt, PromptDraws, read_templates
from .step import perfusion_step
from .text import ConceptText


def train(
    config: PerfusionConfig,
    base: TrainingBase,
    dataset: Dataset,
    covariance: Covariance,
    place: OutputPlace,
    *,
    device: torch.device,
    stopping: StoppingRule | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    metadata: Mapping[str, str] | None = None,
    before_loading: Callable[[], None] | None = None,
) -> Outcome:
    """Train the dataset's only token as a concept.

    Latents are computed once, and the autoencoder leaves the device before training starts. A cancelled run saves
    what it has learned and its whole state, and continues exactly when started again with ``resume``.

    Args:
        place: its folder for LoRAs is that of the concept.
        metadata: further entries for the saved file, such as the workflow.
        before_loading: called when everything that can be checked beforehand has been, for instance to free the
            device of other models.

    Raises:
        PersonalizeError: any of its kinds, before a model is loaded where the cause can be known by then.
    """
    progress, ranks = progress or SilentProgress(), ranks or Ranks()
    if not ranks.is_writer:
        progress = FollowerProgress(progress)
    config = resolve(config, device)
    rule = stopping or FixedSteps()
    token = the_only_token(dataset)
    check_covariance(covariance, base)
    fingerprint = config.resume_fingerprint(
        rule.limit(config.steps),
        base.fingerprint,
        dataset.fingerprint,
        covariance.fingerprint,
        rule.identity(),
        str(ranks.count),
    )
    dtype = dtype_of(config.precision, device)
    resumed = check_states(place.run_folder, fingerprint, resume=config.resume, overwrite=place.overwrite)
    place.check((), may_exist=resumed)
    check_optimizer(config)
    if rule.evaluation is not None:
        rule.evaluation.check(base.schedule.timesteps)
    if rule.pictures is not None:
        rule.pictures.check()
    tokenizer = base.tokenizer()
    check_tokens(dataset.tokens, tokenizer)
    refuse_cut_initializers(dataset.tokens, tokenizer)
    if before_loading is not None:
        before_loading()
    reset_peak_memory(device)
    side = config.resolution or (base.family.resolution if base.family.size_conditioning else 512)
    sized = base.family.size_conditioning
    preview_prompt = config.preview_prompt or dataset.examples[0].caption
    generator = torch.Generator().manual_seed(config.seed)
    templates = read_templates(config.templates) if config.prompts == "templates" else None
    prompts = PromptDraws(dataset, token, templates, generator, config.batch_size, ranks)
    cancelled = False
    try:
        vae = base.load_vae(torch.float32, device)  # once per picture: no reason to round what training aims at
        latents = LatentCache.build(
            dataset.examples,
            vae,
            size=side,
            crop=config.crop,
            variants=config.crop_variants,
            flip=config.flip,
            seed=config.seed,
            shrink_mask=_shrink_mask,
            progress=progress,
        )
        sampling = rule.pictures is not None or config.preview_every and ranks.is_writer
        vae = vae.parked(dtype) if sampling else None
        likeness = None if rule.pictures is None else Likeness(rule.pictures.clip, dataset, device)
        free_memory(device)
        if progress.cancelled():
            raise Cancelled
        progress.report(0, 1, "loading the model")
        text = ConceptText(base.family, base.load_text_encoders(dtype, device), tokenizer, token)
        text.rows(prompts.all)
        uncond, preview_superclass = (
            text.encode_frozen([prompt]).to(device)
            for prompt in ("", replace_triggers(preview_prompt, {token.trigger: token.initializer}))
        )
        if progress.cancelled():
            raise Cancelled
        unet = base.load_unet(dtype, device).requires_grad_(False)
    except Cancelled:
        cancelled = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, "while loading the model and encoding pictures") from error
    if ranks.any(cancelled):  # in all processes or in none, or the others would wait for this one for ever
        return Outcome(TrainResult(stopped_by="cancelled"))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    schedule = base.noise_schedule()
    order = BatchOrder(len(dataset.examples))
    batches = LatentBatches(config, order, generator, latents, None, schedule.timesteps, ranks)

    def next_batch() -> tuple[LatentBatch, list[Prompt]]:
        batch = batches.next()
        return batch, prompts.next(batch.draws)

    # The concept starts from the first batch, which training then meets again.
    kept = generator.get_state(), order.state_dict()
    _, first = next_batch()
    generator.set_state(kept[0])
    order.load_state_dict(kept[1])
    encodings = text.encode_frozen([prompt.superclass for prompt in first]).embeds
    concept = TrainedConcept(config, unet, covariance, encodings, text.superclass_rows(first), ranks)

    def conditioning(shown: Sequence[Prompt], time_ids: Tensor | None) -> Conditioning:
        with autocast(config.precision, device):
            embeds = text.encode(shown)
        return Conditioning(embeds.embeds, embeds.pooled, time_ids)

    def step() -> Tensor:
        batch, shown = next_batch()
        told = conditioning(shown, batch.time_ids.to(device) if sized else None)
        concept.follow(told.embeds, text.rows(shown))
        return perfusion_step(
            unet,
            schedule,
            latents=batch.latents.to(device),
            noise=batch.noise.to(device),
            timesteps=batch.timesteps,
            conditioning=told,
            masks=batch.masks.to(device) if config.masked_loss and batch.masks is not None else None,
            snr_gamma=config.snr_gamma,
            autocast=autocast(config.precision, device),
        )

    def sampled_conditioning(shown: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(shown), device=device) if sized else None
        empty = uncond[[0] * len(shown)]
        personalized = conditioning([Prompt(text, "") for text in shown], sizes)
        return Conditioning(empty.embeds, empty.pooled, sizes), personalized

    def preview_conditioning() -> tuple[Conditioning, Conditioning, Tensor]:
        return *sampled_conditioning([preview_prompt]), preview_superclass.embeds

    evaluation = None
    if rule.evaluation is not None:
        fixed_loss = FixedLoss(config, unet, schedule, prompts, latents, conditioning, sized=sized, device=device)
        evaluation = Evaluation(
            rule.evaluation, latents, timesteps=schedule.timesteps, seed=config.seed, loss=fixed_loss
        )
    elif rule.pictures is not None:
        evaluation = PictureScore(
            rule.pictures,
            likeness,
            rule.pictures.choose([prompt.text for prompt in prompts.all]),
            sampled_conditioning,
            config=config,
            unet=unet,
            vae=vae,
            schedule=schedule,
            side=side,
            device=device,
            ranks=ranks,
        )
    files: list[Path] = []

    def save(finished: TrainResult) -> None:
        path = write_concept(
            place.lora_path,
            concept.finished(token, text.learned, base.family, place.lora_path),
            config=config.as_dict(),
            extra=metadata,
            dtype=torch.float16 if config.save_precision == "fp16" else torch.float32,
            overwrite=place.overwrite or resumed,
        )
        files[:] = [path]

    previews = Previews(
        config, unet, concept.edits, vae, schedule, preview_conditioning, side=side, device=device, progress=progress
    )
    result = train_loop(
        config,
        [
            ParameterGroup("embedding", text.learned, config.embedding_learning_rate, config.weight_decay),
            *concept.groups,
        ],
        step,
        device=device,
        state={"generator": GeneratorState(generator), "order": order, "concept": concept},
        stopping=rule,
        evaluation=evaluation,
        progress=progress,
        ranks=ranks,
        run_folder=place.run_folder,
        fingerprint=fingerprint,
        preview=previews.make,
        save=save,
    )
    return Outcome(result, tuple(files), previews.last)


def the_only_token(dataset: Dataset) -> LearnedToken:
    """The concept's word; ConfigError when there is not exactly one, without a superclass, or with class pictures."""
    if len(dataset.tokens) != 1:
        raise ConfigError(
            f"Perfusion teaches one word per training, the dataset has {len(dataset.tokens)}; give one token, and "
            "train further concepts on their own"
        )
    token = dataset.tokens[0]
    if not token.initializer.strip():
        raise ConfigError(
            f"token {token.trigger} has no initializer; Perfusion starts from the superclass word, such as teddy"
        )
    if dataset.class_examples:
        raise ConfigError("Perfusion has no use for class pictures; leave them out")
    return token


def check_covariance(covariance: Covariance, base: TrainingBase) -> None:
    """Raise IncompatibleModelError unless the covariance is of the base's text encodings."""
    covariance.check_family(base.family.name)
    width = base.unet.config["cross_attention_dim"]
    if covariance.width != width:
        raise IncompatibleModelError(
            f"the covariance is of text encodings of width {covariance.width}, those of {base.label} are {width} wide; "
            f"estimate one for {base.family.label}"
        )


def _shrink_mask(mask: Tensor, size: tuple[int, int], name: str) -> Tensor:
    return resize_mask(soft_mask(mask, name).unsqueeze(0), size)[0]


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``perfusion`` recipe; values as in example.toml."""
    settings = build(PerfusionRun, values)
    device = ranks.device or pick_device(settings.device)
    if settings.covariance is None:
        raise ConfigError(NO_COVARIANCE)
    covariance = read_covariance(settings.covariance)
    dataset = settings.dataset.open()
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    outcome = train(
        settings.train,
        base,
        dataset,
        covariance,
        settings.output.place(),
        device=device,
        stopping=settings.stopping,
        progress=progress,
        ranks=ranks,
    )
    return report(outcome, ranks)
