"""From settings and pictures to a training that is ready to step: what recipes share."""

from collections.abc import Callable, Sequence

import torch

from .base import TrainingBase, open_base
from .cache import Augmentation, LatentCache, ShrinkMask, average_cells
from .checkpoint import check_states
from .config import TrainConfig
from .dataset import Dataset
from .devices import dtype_of, free_memory, is_out_of_memory, out_of_memory, reset_peak_memory, resolve
from .likeness import Likeness
from .loop import TrainResult
from .optimizer import check_optimizer
from .outcome import Outcome, report
from .output import OutputPlace
from .prepared import Prepared, Surroundings, Text
from .progress import Cancelled, FollowerProgress, Progress, SilentProgress
from .ranks import Ranks
from .settings import RunSettings, pick_device
from .stopping import FixedSteps
from .text import check_tokens


def prepare(
    config: TrainConfig,
    base: TrainingBase,
    dataset: Dataset,
    place: OutputPlace,
    around: Surroundings,
    *,
    text: Callable[..., Text],
    main: bool = True,
    embeddings: bool = True,
    identities: Sequence[str] = (),
    augmentation: Augmentation | None = None,
    shrink_mask: ShrinkMask = average_cells,
    side: int = 0,
    prompts: Sequence[str] = (),
    preview_prompt: str = "",
) -> Prepared[Text] | Outcome:
    """Check everything that can be checked, then cache latents and encodings and load the UNet.

    The autoencoder and, unless they are trained, the text encoders have left the device afterwards.

    Args:
        text: makes the text side, of ``(config, tokenizer, prompts=…, device=…, generator=…)``; the config is the
            resolved one.
        main: whether a file is written besides the embeddings.
        embeddings: whether tokens have files of their own.
        identities: of what else decides the course of training, besides settings, base and pictures.
        augmentation: of the pictures of the dataset, not of its class.
        shrink_mask: how masks come to the size of latents.
        side: of the square pictures in pixels; 0 takes the settings' or else the base's own.
        prompts: what pictures are shown with, where that is not their captions. A stopping rule that samples pictures
            takes some.
        preview_prompt: what previews show; empty takes the settings' or else the first of the prompts.

    Returns:
        The outcome when the user cancelled.

    Raises:
        PersonalizeError: any of its kinds, before a model is loaded where the cause can be known by then.
    """
    device, progress, ranks = around.device, around.progress or SilentProgress(), around.ranks or Ranks()
    if not ranks.is_writer:
        progress = FollowerProgress(progress)
    config = resolve(config, device)
    rule = around.stopping or FixedSteps()
    fingerprint = config.resume_fingerprint(
        rule.limit(config.steps),
        base.fingerprint,
        dataset.fingerprint,
        *identities,
        rule.identity(),
        str(ranks.count),
    )
    dtype = dtype_of(config.precision, device)
    resumed = check_states(place.run_folder, fingerprint, resume=config.resume, overwrite=place.overwrite)
    place.check(dataset.tokens if embeddings else (), main=main, may_exist=resumed)
    check_optimizer(config)
    if rule.evaluation is not None:
        rule.evaluation.check(base.schedule.timesteps)
    if rule.pictures is not None:
        rule.pictures.check()
    tokenizer = base.tokenizer()
    check_tokens(dataset.tokens, tokenizer)
    if around.before_loading is not None:
        around.before_loading()
    reset_peak_memory(device)
    side = side or config.resolution or base.family.resolution
    prompts = prompts or list(dict.fromkeys(example.caption for example in dataset.examples))
    preview_prompt = preview_prompt or config.preview_prompt or prompts[0]
    checked_prompts = tuple(rule.pictures.choose(prompts)) if rule.pictures is not None else ()
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
            "shrink_mask": shrink_mask,
            "progress": progress,
        }
        latents = LatentCache.build(dataset.examples, vae, augmentation=augmentation, **cuts)
        class_latents = LatentCache.build(dataset.class_examples, vae, **cuts) if dataset.class_examples else None
        sampling = rule.pictures is not None or config.preview_every and ranks.is_writer
        vae = vae.parked(dtype) if sampling else None
        likeness = None if rule.pictures is None else Likeness(rule.pictures.clip, dataset, device)
        free_memory(device)
        if progress.cancelled():
            raise Cancelled
        progress.report(0, 1, "encoding captions")
        text_side = text(
            config, tokenizer, prompts=(preview_prompt, *checked_prompts), device=device, generator=generator
        )
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
        return Outcome(TrainResult(stopped_by="cancelled"))
    return Prepared(
        config=config,
        base=base,
        dataset=dataset,
        place=place,
        around=around,
        rule=rule,
        progress=progress,
        ranks=ranks,
        fingerprint=fingerprint,
        overwrite=place.overwrite or resumed,
        generator=generator,
        latents=latents,
        class_latents=class_latents,
        text=text_side,
        unet=unet,
        vae=vae,
        side=side,
        preview_prompt=preview_prompt,
        likeness=likeness,
        checked_prompts=checked_prompts,
    )


def run_from_settings(settings: RunSettings, train: Callable[..., Outcome], progress: Progress, ranks: Ranks) -> int:
    """A whole run from the command line; its exit status.

    Args:
        settings: with the recipe's own ``train`` table.
        train: of ``(config, base, dataset, place, **surroundings)``.
    """
    device = ranks.device or pick_device(settings.device)
    dataset = settings.dataset.open()
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    outcome = train(
        settings.train,
        base,
        dataset,
        settings.output.place(),
        device=device,
        stopping=settings.stopping,
        progress=progress,
        ranks=ranks,
    )
    return report(outcome, ranks)
