"""DCO training from pictures to files, read from top to bottom."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import ATTENTION, add_lora, read_lora
from ..base import TrainingBase
from ..config import build
from ..dataset import Dataset
from ..devices import autocast
from ..optimizer import ParameterGroup
from ..order import BatchOrder
from ..outcome import Outcome
from ..output import OutputPlace, save_personalization
from ..preparation import prepare, run_from_settings
from ..prepared import Surroundings
from ..progress import Progress
from ..ranks import Ranks
from ..text_side import TextSettings, TextSide
from .config import DCOConfig, DCORun
from .evaluation import FixedLoss
from .step import dco_step


def train(config: DCOConfig, base: TrainingBase, dataset: Dataset, place: OutputPlace, **surroundings: Any) -> Outcome:
    """Train a LoRA, and the dataset's learned tokens, with the DCO loss.

    Frozen text encodings and latents are computed once; the autoencoder and, unless tokens or the text
    encoders are trained, the text encoders leave the device before training starts. A cancelled run saves
    what it has learned and its whole state, and continues exactly when started again with ``resume``.

    Args:
        surroundings: as Surroundings: device, stopping, progress and so on.

    Raises:
        PersonalizeError: any of its kinds, before a model is loaded where the cause can be known by then.
    """

    def text_side(config: DCOConfig, tokenizer, **more) -> TextSide:
        captions = [example.caption for example in (*dataset.examples, *dataset.class_examples)]
        frozen = [example.base_caption for example in dataset.examples]
        return TextSide(
            text_settings(config), base, dataset.tokens, tokenizer, captions=captions, frozen=frozen, **more
        )

    around = Surroundings(**surroundings)
    prepared = prepare(config, base, dataset, place, around, text=text_side)
    if isinstance(prepared, Outcome):
        return prepared
    config, unet, text, device = prepared.config, prepared.unet, prepared.text, prepared.device
    unet_lora = add_lora(unet, config.rank, ATTENTION, prepared.generator)
    order = BatchOrder(len(dataset.examples), len(dataset.class_examples))
    batches, schedule = prepared.start(order), prepared.schedule

    def step() -> Tensor:
        batch = batches.next()
        instances = [dataset.examples[draw.example] for draw in batch.draws]
        classes = [dataset.class_examples[d.class_example] for d in batch.draws if d.class_example is not None]
        time_ids = prepared.told_sizes(batch.time_ids)
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
            ranks=prepared.ranks,
        )

    def save() -> list[Path]:
        return save_personalization(
            place,
            read_lora(unet, "unet") | text.read_lora(),
            text.rows(),
            dataset.tokens,
            family=base.family,
            layers_per_block=base.layers_per_block,
            method="dco",
            config=config,
            overwrite=prepared.overwrite,
            extra=around.metadata,
        )

    evaluate = FixedLoss(config, unet, schedule, text, dataset, prepared.latents, sized=prepared.sized, device=device)
    groups = [ParameterGroup("unet", unet_lora, config.learning_rate, config.weight_decay), *text.groups]
    return prepared.run(
        groups, order, step, evaluate=evaluate, save=save, clip_also=text.clip_also, after_step=text.retract
    )


def text_settings(config: DCOConfig) -> TextSettings:
    """How the text side is trained: tokens as the authors train them."""
    return TextSettings(
        precision=config.precision,
        learning_rate=config.text_learning_rate,
        weight_decay=config.weight_decay if config.text_weight_decay == -1 else config.text_weight_decay,
        lora_rank=config.rank if config.train_text_encoder else 0,
        gradient_checkpointing=config.gradient_checkpointing,
        whole_tables=True,
        token_norm=config.token_norm,
    )


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``dco`` recipe; values as in example.toml."""
    return run_from_settings(build(DCORun, values), train, progress, ranks)
