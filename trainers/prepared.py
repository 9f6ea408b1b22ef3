"""A training that is ready to step, and its way to the end: what recipes share once everything is loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.dvar import EvaluationBatch
from ..models.schedules import NoiseSchedule
from .base import TrainingBase
from .batches import LatentBatches
from .cache import LatentCache
from .checkpoint import GeneratorState, Stateful
from .conditioning import Conditioning
from .config import TrainConfig
from .dataset import Dataset
from .evaluation import Evaluation, Evaluator
from .likeness import Likeness, PictureScore
from .loop import train_loop
from .optimizer import ParameterGroup
from .order import BatchOrder
from .outcome import Outcome
from .output import OutputPlace
from .preview import Previews
from .progress import Progress
from .ranks import Ranks
from .stopping import StoppingRule
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


class SampledText(Protocol):
    """What sampling pictures asks of a recipe's text side."""

    def policy(self, prompts: list[str], time_ids: Tensor | None) -> Conditioning:
        """Conditioning as trained so far."""

    def reference(self, prompts: list[str], time_ids: Tensor | None) -> Conditioning:
        """Conditioning of the frozen base, which at least knows the empty prompt."""


class PreviewMaker(Protocol):
    """What shows how a training is getting on."""

    last: Image.Image | None

    def make(self, step: int) -> Image.Image | None:
        """A picture with the weights as they are now; None when the user cancels meanwhile."""


Text = TypeVar("Text", bound=SampledText)


@dataclass(frozen=True)
class Prepared(Generic[Text]):
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
    text: Text
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
            self.config, order, self.generator, self.latents, self.class_latents, self.schedule.timesteps, self.ranks
        )

    def told_sizes(self, time_ids: Tensor) -> Tensor | None:
        """The rows' sizes on the device, or None for a UNet that is told none."""
        return time_ids.to(self.device) if self.sized else None

    def previews(self) -> Previews:
        """Samples the preview prompt."""
        return Previews(
            self.config,
            self.unet,
            self.vae,
            self.schedule,
            lambda: self._conditioning([self.preview_prompt]),
            side=self.side,
            device=self.device,
            progress=self.progress,
        )

    def run(
        self,
        groups: Sequence[ParameterGroup],
        order: BatchOrder,
        step: Callable[[], Tensor],
        *,
        evaluate: Callable[[EvaluationBatch], Tensor],
        save: Callable[[], Sequence[Path]],
        previews: PreviewMaker | None = None,
        state: Mapping[str, Stateful] | None = None,
        **more: Any,
    ) -> Outcome:
        """Train to the end.

        Args:
            step, groups: as for train_loop; those of the text side included.
            evaluate: the recipe's loss on the batch that a stopping rule asks for.
            save: writes what was learned.
            previews: None samples the preview prompt.
            state: as for train_loop, besides the generator and the order.
            more: further arguments of train_loop.
        """
        files: list[Path] = []
        previews = previews or self.previews()
        result = train_loop(
            self.config,
            groups,
            step,
            device=self.device,
            state={"generator": GeneratorState(self.generator), "order": order, **(state or {})},
            stopping=self.rule,
            evaluation=self._evaluation(evaluate),
            progress=self.progress,
            ranks=self.ranks,
            run_folder=self.place.run_folder,
            fingerprint=self.fingerprint,
            preview=previews.make,
            save=lambda finished: files.extend(save()),
            **more,
        )
        return Outcome(result, tuple(files), previews.last)

    def _evaluation(self, loss: Callable[[EvaluationBatch], Tensor]) -> Evaluator | None:
        """What the stopping rule asks for."""
        if self.rule.evaluation is not None:
            timesteps = self.schedule.timesteps
            return Evaluation(self.rule.evaluation, self.latents, timesteps=timesteps, seed=self.config.seed, loss=loss)
        if self.likeness is None:
            return None
        return PictureScore(
            self.rule.pictures,
            self.likeness,
            self.checked_prompts,
            self._conditioning,
            config=self.config,
            unet=self.unet,
            vae=self.vae,
            schedule=self.schedule,
            side=self.side,
            device=self.device,
            ranks=self.ranks,
        )

    def _conditioning(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        """Conditioning of as many empty prompts, and of the prompts as trained so far."""
        sizes = self.told_sizes(torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]] * len(prompts)))
        return self.text.reference([""] * len(prompts), sizes), self.text.policy(list(prompts), sizes)
