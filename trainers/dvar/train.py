"""The three methods' training from pictures to files; they differ in what is trained, in the loss and in files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...models.denoising import denoising_error
from ..base import TrainingBase
from ..batches import LatentBatch
from ..cache import Augmentation
from ..conditioning import predict
from ..dataset import Dataset
from ..devices import autocast
from ..loop import TrainResult
from ..optimizer import ParameterGroup
from ..order import BatchOrder
from ..outcome import Outcome
from ..output import OutputPlace
from ..preparation import prepare
from ..prepared import Prepared, Surroundings
from ..progress import Cancelled
from ..prompts import Prompts
from ..text import refuse_cut_initializers
from ..text_side import TextSettings, TextSide
from .config import MethodConfig, PriorConfig
from .evaluate import plain_error
from .prior import with_class_pictures


def plain_loss(
    config: MethodConfig, prediction: Tensor, target: Tensor, batch: LatentBatch, weights: Tensor | None
) -> Tensor:
    """Error of the pictures, and of the class pictures where there are any; those come last."""
    first = len(batch.draws)
    loss = denoising_error(prediction[:first], target[:first], weights)
    if len(prediction) > first:
        loss = loss + config.prior_loss_weight * denoising_error(prediction[first:], target[first:])
    return loss


@dataclass(frozen=True)
class Method:
    """What one method has of its own."""

    save: Callable[[Prepared], list[Path]]
    main: bool = True
    """Whether it saves a file besides the embeddings."""
    attach: Callable[[Prepared], Mapping[str, nn.Parameter]] = lambda prepared: {}
    """Makes the UNet's trained parameters, by name; none leave it frozen."""
    loss: Callable[[MethodConfig, Tensor, Tensor, LatentBatch, Tensor | None], Tensor] = plain_loss
    """Of the settings, prediction, target, batch and weights of the timesteps."""
    rate: Callable[[MethodConfig, Dataset], float] = lambda config, dataset: config.learning_rate
    augmentation: Augmentation | None = None
    prefixes: tuple[str, ...] = ()
    """What the augmentation has captions begin with."""


def train_method(
    method: Method,
    config: MethodConfig,
    base: TrainingBase,
    dataset: Dataset,
    place: OutputPlace,
    **surroundings: Any,
) -> Outcome:
    """Train the dataset's tokens, and what the method attaches to the UNet, with the denoising error.

    Latents are computed once, and the autoencoder leaves the device; so do the text encoders where there are no
    tokens. A cancelled run saves what it has learned and its whole state, and continues exactly when started again
    with ``resume``.

    Args:
        surroundings: as Surroundings: device, stopping, progress and so on.

    Raises:
        PersonalizeError: any of its kinds, before a model is loaded where the cause can be known by then.
    """
    refuse_cut_initializers(dataset.tokens, base.tokenizer() if dataset.tokens else None)
    prompts, around = Prompts(config.prompts, dataset, config.class_word), Surroundings(**surroundings)
    if isinstance(config, PriorConfig):
        dataset, around = with_class_pictures(config, base, dataset, place, around)

    def text_side(config: MethodConfig, tokenizer, **more) -> TextSide:
        settings = TextSettings(
            precision=config.precision, learning_rate=method.rate(config, dataset), weight_decay=config.weight_decay
        )
        captions = [prefix + prompt for prompt in prompts.all for prefix in ("", *method.prefixes)]
        captions += [example.caption for example in dataset.class_examples]
        return TextSide(settings, base, dataset.tokens, tokenizer, captions=captions, **more)

    try:
        prepared = prepare(
            config,
            base,
            dataset,
            place,
            around,
            text=text_side,
            main=method.main,
            augmentation=method.augmentation,
            prompts=prompts.all,
        )
    except Cancelled:  # while pictures of the class were drawn
        return Outcome(TrainResult(stopped_by="cancelled"))
    if isinstance(prepared, Outcome):
        return prepared
    config, device, schedule = prepared.config, prepared.device, prepared.schedule
    groups = list(prepared.text.groups)
    if attached := method.attach(prepared):
        groups.insert(0, ParameterGroup("unet", dict(attached), method.rate(config, dataset), config.weight_decay))
    order = BatchOrder(len(dataset.examples), len(dataset.class_examples))
    batches = prepared.start(order)

    def step() -> Tensor:
        batch = batches.next()
        names = prompts.draw(batch.draws, prepared.generator, prepared.ranks)
        names = [prefix + name for prefix, name in zip(batch.prefixes, names)]
        names += [dataset.class_examples[d.class_example].caption for d in batch.draws if d.class_example is not None]
        latents, noise = batch.latents.to(device), batch.noise.to(device)
        noisy = schedule.add_noise(latents, noise, batch.timesteps)
        with autocast(config.precision, device):
            told = prepared.text.policy(names, prepared.told_sizes(batch.time_ids))
            prediction = predict(prepared.unet, noisy, batch.timesteps.to(device), told)
        weights = None
        if config.snr_gamma:
            weights = schedule.min_snr_weights(batch.timesteps[: len(batch.draws)], config.snr_gamma)
        target = schedule.target(latents, noise, batch.timesteps)
        return method.loss(config, prediction, target, batch, weights)

    return prepared.run(
        groups,
        order,
        step,
        evaluate=lambda batch: plain_error(prepared, prompts, batch),
        save=lambda: method.save(prepared),
    )
