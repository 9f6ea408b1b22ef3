"""From settings and pictures to a training that is ready to step, and from there to its end: what recipes share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.dvar import EvaluationBatch
from ..models.schedules import NoiseSchedule
from .base import TrainingBase, open_base
from .batches import LatentBatches
from .cache import Augmentation, LatentCache
from .checkpoint import GeneratorState, check_states
from .conditioning import Conditioning
from .config import TrainConfig
from .dataset import Dataset
from .devices import dtype_of, free_memory, is_out_of_memory, out_of_memory, reset_peak_memory, resolve
from .evaluation import Evaluation
from .likeness import Likeness, PictureScore
from .loop import TrainResult, train_loop
from .optimizer import ParameterGroup, check_optimizer
from .order import BatchOrder
from .outcome import Outcome, report
from .output import OutputPlace
from .preview import Previews
from .progress import Cancelled, FollowerProgress, Progress, SilentProgress
from .ranks import Ranks
from .settings import RunSettings, pick_device
from .stopping import FixedSteps, StoppingRule
from .text import check_tokens
from .text_side import TextSide
from .vae import Autoencoder


@dataclass(frozen=True)
class Surroundings:
    """Where a recipe runs; the same for all of them.

    Args:
        stopping: None takes all the steps of the settings.
        metadata: further entries for the saved files, such as the workflow.
        before_loading: called when everything that can be checked beforehand has been, for instance to free the
            device of other models.
    """

    device: torch.device
    stopping: StoppingRule | None = None
    progress: Progress | None = None
    ranks: Ranks | None = None
    metadata: Mapping[str, str] | None = None
    before_loading: Callable[[], None] | None = None


@dataclass(frozen=True)
class Prepared:
    """All that a training needs, loaded and cached."""

    config: TrainConfig
    """With the precision that suits the device."""
    base: TrainingBase
    dataset: Dataset
    place: OutputPlace
    around: Surroundings
    rule: StoppingRule
    progress: Progress
    ranks: Ranks
    fingerprint: str
    overwrite: bool
    """Whether files of the same name are to be replaced, also because the run continues its own."""
    generator: torch.Generator
    latents: LatentCache
    class_latents: LatentCache | None
    text: TextSide
    unet: nn.Module
    """Frozen."""
    vae: Autoencoder | None
    """Off the device, where pictures are to be sampled."""
    side: int
    preview_prompt: str
    likeness: Likeness | None
    """What compares sampled pictures with the dataset's, where the rule asks for it."""
    checked_prompts: tuple[str, ...]
    """Those of the pictures that are then sampled."""

    @property
    def device(self) -> torch.device:
        return self.around.device

    @property
    def schedule(self) -> NoiseSchedule:
        return self.base.schedule

    @property
    def sized(self) -> bool:
        """Whether the UNet is told sizes, as SDXL's is."""
        return self.base.family.size_conditioning

    def start(self, order: BatchOrder) -> LatentBatches:
        """Ready the UNet, to which the recipe has attached what it trains, and draw from ``order``."""
        if self.config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        return LatentBatches(
            self.config,
            order,
            self.generator,
            self.latents,
            self.class_latents,
            self.base.schedule.timesteps,
            self.ranks,
        )

    def told_sizes(self, time_ids: Tensor) -> Tensor | None:
        """The rows' sizes on the device, or None for a UNet that is told none."""
        return time_ids.to(self.device) if self.sized else None

    def run(
        self,
        groups: Sequence[ParameterGroup],
        order: BatchOrder,
        step: Callable[[], Tensor],
        *,
        evaluate: Callable[[EvaluationBatch], Tensor],
        save: Callable[[], Sequence[Path]],
    ) -> Outcome:
        """Train to the end.

        Args:
            step, groups: as for train_loop; those of the text side included.
            evaluate: the recipe's loss on the batch that a stopping rule asks for.
            save: writes what was learned.
        """
        files: list[Path] = []

        def conditioning(prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
            sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]])
            time_ids = self.told_sizes(sizes.expand(len(prompts), -1))
            return self.text.reference([""] * len(prompts), time_ids), self.text.policy(list(prompts), time_ids)

        previews = Previews(
            self.config,
            self.unet,
            self.vae,
            self.schedule,
            lambda: conditioning([self.preview_prompt]),
            side=self.side,
            device=self.device,
            progress=self.progress,
        )
        evaluation = None
        if self.rule.evaluation is not None:
            timesteps = self.base.schedule.timesteps
            evaluation = Evaluation(
                self.rule.evaluation, self.latents, timesteps=timesteps, seed=self.config.seed, loss=evaluate
            )
        elif self.likeness is not None:
            evaluation = PictureScore(
                self.rule.pictures,
                self.likeness,
                self.checked_prompts,
                conditioning,
                config=self.config,
                unet=self.unet,
                vae=self.vae,
                schedule=self.schedule,
                side=self.side,
                device=self.device,
                ranks=self.ranks,
            )
        result = train_loop(
            self.config,
            groups,
            step,
            device=self.device,
            state={"generator": GeneratorState(self.generator), "order": order},
            clip_also=self.text.clip_also,
            after_step=self.text.retract,
            stopping=self.rule,
            evaluation=evaluation,
            progress=self.progress,
            ranks=self.ranks,
            run_folder=self.place.run_folder,
            fingerprint=self.fingerprint,
            preview=previews.make,
            save=lambda finished: files.extend(save()),
        )
        return Outcome(result, tuple(files), previews.last)


def prepare(
    config: TrainConfig,
    base: TrainingBase,
    dataset: Dataset,
    place: OutputPlace,
    around: Surroundings,
    *,
    text: Callable[..., TextSide],
    main: bool = True,
    augmentation: Augmentation | None = None,
    prompts: Sequence[str] = (),
) -> Prepared | Outcome:
    """Check everything that can be checked, then cache latents and encodings and load the UNet.

    The autoencoder and, unless they are trained, the text encoders have left the device afterwards.

    Args:
        text: makes the text side, of ``(config, tokenizer, prompts=…, device=…, generator=…)``; the config is the
            resolved one.
        main: whether a file is written besides the embeddings.
        augmentation: of the pictures of the dataset, not of its class.
        prompts: what pictures are shown with, where that is not their captions. Previews take the first one, where
            the settings name none, and a stopping rule that samples pictures takes some.

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
        rule.limit(config.steps), base.fingerprint, dataset.fingerprint, rule.identity(), str(ranks.count)
    )
    dtype = dtype_of(config.precision, device)
    resumed = check_states(place.run_folder, fingerprint, resume=config.resume, overwrite=place.overwrite)
    place.check(dataset.tokens, main=main, may_exist=resumed)
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
    side = config.resolution or base.family.resolution
    prompts = prompts or list(dict.fromkeys(example.caption for example in dataset.examples))
    preview_prompt = config.preview_prompt or prompts[0]
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
