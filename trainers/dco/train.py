"""DCO training from pictures to files, read from top to bottom."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters import ATTENTION, add_lora, read_lora
from ..base import TrainingBase, open_base
from ..batches import LatentBatches
from ..cache import LatentCache
from ..checkpoint import GeneratorState, check_states
from ..config import build
from ..dataset import Dataset
from ..devices import autocast, dtype_of, free_memory, is_out_of_memory, out_of_memory, reset_peak_memory, resolve
from ..evaluation import Evaluation
from ..loop import TrainResult, train_loop
from ..optimizer import ParameterGroup, check_optimizer
from ..order import BatchOrder
from ..output import OutputPlace, save_personalization
from ..progress import Cancelled, FollowerProgress, Progress, SilentProgress
from ..ranks import Ranks
from ..settings import pick_device
from ..stopping import FixedSteps, StoppingRule
from ..text import check_tokens
from .config import DCOConfig, DCORun
from .evaluation import FixedLoss
from .preview import Previews
from .step import dco_step
from .text import TextSide


@dataclass(frozen=True)
class DCOResult:
    """What a DCO training leaves."""

    train: TrainResult
    files: tuple[Path, ...] = ()
    """The LoRA first, then one embedding file per learned token; empty when nothing was learned yet."""
    preview: Image.Image | None = None
    """The last preview."""


def train(
    config: DCOConfig,
    base: TrainingBase,
    dataset: Dataset,
    place: OutputPlace,
    *,
    device: torch.device,
    stopping: StoppingRule | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    metadata: Mapping[str, str] | None = None,
    before_loading: Callable[[], None] | None = None,
) -> DCOResult:
    """Train a LoRA, and the dataset's learned tokens, with the DCO loss.

    Frozen text encodings and latents are computed once; the autoencoder and, unless tokens or the text
    encoders are trained, the text encoders leave the device before training starts. A cancelled run saves
    what it has learned and its whole state, and continues exactly when started again with ``resume``.

    Args:
        metadata: further entries for the saved files, such as the workflow.
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
    fingerprint = config.resume_fingerprint(
        rule.limit(config.steps), base.fingerprint, dataset.fingerprint, rule.identity(), str(ranks.count)
    )
    dtype = dtype_of(config.precision, device)
    resumed = check_states(place.run_folder, fingerprint, resume=config.resume, overwrite=place.overwrite)
    place.check(dataset.tokens, may_exist=resumed)
    check_optimizer(config)
    if rule.evaluation is not None:
        rule.evaluation.check(base.schedule.timesteps)
    tokenizer = base.tokenizer()
    check_tokens(dataset.tokens, tokenizer)
    if before_loading is not None:
        before_loading()
    reset_peak_memory(device)
    side = config.resolution or base.family.resolution
    preview_prompt = config.preview_prompt or dataset.examples[0].caption
    generator = torch.Generator().manual_seed(config.seed)
    cancelled = False
    try:
        vae = base.load_vae(torch.float32, device)  # once per picture: no reason to round what training aims at
        cuts = {
            "size": side,
            "crop": config.crop,
            "variants": config.crop_variants,
            "flip": config.flip,
            "seed": config.seed,
            "progress": progress,
        }
        latents = LatentCache.build(dataset.examples, vae, **cuts)
        class_latents = LatentCache.build(dataset.class_examples, vae, **cuts) if dataset.class_examples else None
        vae = vae.parked(dtype) if config.preview_every and ranks.is_writer else None
        free_memory(device)
        if progress.cancelled():
            raise Cancelled
        progress.report(0, 1, "encoding captions")
        text = TextSide(config, base, dataset, tokenizer, prompts=(preview_prompt,), device=device, generator=generator)
        if progress.cancelled():
            raise Cancelled
        unet = base.load_unet(dtype, device).requires_grad_(False)
    except Cancelled:
        cancelled = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, "while loading the model and encoding pictures and captions") from error
    if ranks.any(cancelled):  # in all processes or in none, or the others would wait for this one for ever
        return DCOResult(TrainResult(stopped_by="cancelled"))
    unet_lora = add_lora(unet, config.rank, ATTENTION, generator)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    schedule = base.noise_schedule()
    order = BatchOrder(len(dataset.examples), len(dataset.class_examples))
    batches = LatentBatches(config, order, generator, latents, class_latents, schedule.timesteps, ranks)
    sized = base.family.size_conditioning

    def step() -> Tensor:
        batch = batches.next()
        instances = [dataset.examples[draw.example] for draw in batch.draws]
        classes = [dataset.class_examples[d.class_example] for d in batch.draws if d.class_example is not None]
        time_ids = batch.time_ids.to(device) if sized else None
        with autocast(config.precision, device):
            policy = text.policy([example.caption for example in (*instances, *classes)], time_ids)
        reference = None
        if config.beta > 0:
            reference = text.reference([e.base_caption for e in instances], time_ids)
        return dco_step(
            unet,
            schedule,
            config,
            latents=batch.latents.to(device),
            noise=batch.noise.to(device),
            timesteps=batch.timesteps,
            policy=policy,
            reference=reference,
            class_rows=len(classes),
            autocast=autocast(config.precision, device),
            ranks=ranks,
        )

    def preview_conditioning():
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=device) if sized else None
        return text.reference([""], time_ids), text.policy([preview_prompt], time_ids)

    evaluation = None
    if rule.evaluation is not None:
        fixed_loss = FixedLoss(config, unet, schedule, text, dataset, latents, sized=sized, device=device)
        evaluation = Evaluation(
            rule.evaluation, latents, timesteps=schedule.timesteps, seed=config.seed, loss=fixed_loss
        )
    files: list[Path] = []

    def save(finished: TrainResult) -> None:
        files[:] = save_personalization(
            place,
            read_lora(unet, "unet") | text.read_lora(),
            text.rows(),
            dataset.tokens,
            family=base.family,
            layers_per_block=base.layers_per_block,
            method="dco",
            config=config,
            overwrite=place.overwrite or resumed,
            extra=metadata,
        )

    previews = Previews(config, unet, vae, schedule, preview_conditioning, side=side, device=device, progress=progress)
    result = train_loop(
        config,
        [ParameterGroup("unet", unet_lora, config.learning_rate, config.weight_decay), *text.groups],
        step,
        device=device,
        state={"generator": GeneratorState(generator), "order": order},
        clip_also=text.clip_also,
        after_step=text.retract,
        stopping=rule,
        evaluation=evaluation,
        progress=progress,
        ranks=ranks,
        run_folder=place.run_folder,
        fingerprint=fingerprint,
        preview=previews.make,
        save=save,
    )
    return DCOResult(result, tuple(files), previews.last)


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``dco`` recipe; values as in example.toml."""
    settings = build(DCORun, values)
    device = ranks.device or pick_device(settings.device)
    dataset = settings.dataset.open()
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    result = train(
        settings.train,
        base,
        dataset,
        settings.output.place(),
        device=device,
        stopping=settings.stopping,
        progress=progress,
        ranks=ranks,
    )
    if ranks.is_writer:
        print(f"\n{result.train.summary}")
        for path in result.files:
            print(f"saved {path}")
    return 130 if result.train.stopped_by == "cancelled" else 0
