"""Perfusion training from pictures to a concept file, read from top to bottom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import ConfigError
from ...models.perfusion import Covariance, read_covariance, resize_mask, soft_mask, write_concept
from ..base import TrainingBase
from ..batches import LatentBatch
from ..conditioning import Conditioning
from ..config import build
from ..dataset import Dataset
from ..devices import autocast, dtype_of
from ..evaluation import EvaluationBatch
from ..optimizer import ParameterGroup
from ..order import BatchOrder
from ..outcome import Outcome
from ..output import OutputPlace
from ..preparation import prepare, run_from_settings
from ..prepared import Surroundings
from ..progress import Progress
from ..ranks import Ranks
from ..text import refuse_cut_initializers
from .checks import check_covariance, the_only_token
from .concept import TrainedConcept
from .config import NO_COVARIANCE, PerfusionConfig, PerfusionRun
from .preview import LockedPreviews
from .prompts import Prompt, PromptDraws, all_prompts, read_templates
from .step import perfusion_step
from .text import ConceptText


def train(
    config: PerfusionConfig,
    base: TrainingBase,
    dataset: Dataset,
    covariance: Covariance,
    place: OutputPlace,
    **surroundings: Any,
) -> Outcome:
    """Train the dataset's only token as a concept.

    Latents are computed once, and the autoencoder leaves the device before training starts. A cancelled run saves
    what it has learned and its whole state, and continues exactly when started again with ``resume``.

    Args:
        place: its folder for LoRAs is that of the concept.
        surroundings: as Surroundings: device, stopping, progress and so on.

    Raises:
        PersonalizeError: any of its kinds, before a model is loaded where the cause can be known by then.
    """
    token, around = the_only_token(dataset), Surroundings(**surroundings)
    check_covariance(covariance, base)
    refuse_cut_initializers(dataset.tokens, base.tokenizer())
    templates = read_templates(config.templates) if config.prompts == "templates" else None
    known = all_prompts(dataset, token, templates)
    preview = Prompt.of(config.preview_prompt or dataset.examples[0].caption, token)

    def text_side(config: PerfusionConfig, tokenizer, *, device: torch.device, **_more) -> ConceptText:
        encoders = base.load_text_encoders(dtype_of(config.precision, device), device)
        text = ConceptText(base.family, encoders, tokenizer, token, frozen=["", preview.superclass])
        text.rows(known)  # refuses a prompt that is cut off before the word
        return text

    prepared = prepare(
        config,
        base,
        dataset,
        place,
        around,
        text=text_side,
        embeddings=False,
        identities=[covariance.fingerprint],
        shrink_mask=_shrink_mask,
        side=config.resolution or (base.family.resolution if base.family.size_conditioning else 512),
        prompts=[prompt.text for prompt in known],
        preview_prompt=preview.text,
    )
    if isinstance(prepared, Outcome):
        return prepared
    config, unet, text, device = prepared.config, prepared.unet, prepared.text, prepared.device
    order, generator = BatchOrder(len(dataset.examples)), prepared.generator
    batches = prepared.start(order)
    prompts = PromptDraws(dataset, token, templates, generator, config.batch_size, prepared.ranks)

    def next_batch() -> tuple[LatentBatch, list[Prompt]]:
        batch = batches.next()
        return batch, prompts.next(batch.draws)

    # The concept starts from the first batch, which training then meets again.
    kept = generator.get_state(), order.state_dict()
    _, first = next_batch()
    generator.set_state(kept[0])
    order.load_state_dict(kept[1])
    encodings = text.encode_frozen([prompt.superclass for prompt in first]).embeds
    concept = TrainedConcept(config, unet, covariance, encodings, text.superclass_rows(first), prepared.ranks)
    if token.rows > 1:  # the last of them is elsewhere when the superclass is shorter
        concept.follow(text.encode_frozen([prompt.text for prompt in first]).embeds, text.rows(first), decay=0.0)

    def conditioning(shown: Sequence[Prompt], time_ids: Tensor) -> Conditioning:
        with autocast(config.precision, device):
            embeds = text.encode(shown)
        return Conditioning(embeds.embeds, embeds.pooled, prepared.told_sizes(time_ids))

    def loss(batch: LatentBatch | EvaluationBatch, told: Conditioning, masks: Tensor | None) -> Tensor:
        return perfusion_step(
            unet,
            prepared.schedule,
            latents=batch.latents.to(device),
            noise=batch.noise.to(device),
            timesteps=batch.timesteps,
            conditioning=told,
            masks=masks.to(device) if config.masked_loss and masks is not None else None,
            snr_gamma=config.snr_gamma,
            autocast=autocast(config.precision, device),
        )

    def step() -> Tensor:
        batch, shown = next_batch()
        told = conditioning(shown, batch.time_ids)
        concept.follow(told.embeds, text.rows(shown))
        return loss(batch, told, batch.masks)

    def evaluate(batch: EvaluationBatch) -> Tensor:
        """With the target input where training has left it; an evaluation does not move it."""
        told = conditioning(prompts.fixed(batch.captions), prepared.latents.time_ids(batch.pictures))
        return loss(batch, told, prepared.latents.masks(batch.pictures))

    def save() -> list[Path]:
        path = write_concept(
            place.lora_path,
            concept.finished(token, text.learned, base.family, place.lora_path),
            config=config.as_dict(),
            extra=around.metadata,
            dtype=torch.float16 if config.save_precision == "fp16" else torch.float32,
            overwrite=prepared.overwrite,
        )
        return [path]

    # Without guidance, the empty prompt has no rows.
    locked = [preview.superclass] if config.preview_guidance == 1 else ["", preview.superclass]
    previews = LockedPreviews(prepared.previews(), concept.edits, text.reference(locked, None).embeds)
    words = ParameterGroup("embedding", text.learned, config.embedding_learning_rate, config.weight_decay)
    groups = [words, *concept.groups]
    return prepared.run(
        groups, order, step, evaluate=evaluate, save=save, previews=previews, state={"concept": concept}
    )


def _shrink_mask(mask: Tensor, size: tuple[int, int], name: str) -> Tensor:
    return resize_mask(soft_mask(mask, name).unsqueeze(0), size)[0]


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``perfusion`` recipe; values as in example.toml."""
    settings = build(PerfusionRun, values)
    if settings.covariance is None:
        raise ConfigError(NO_COVARIANCE)
    covariance = read_covariance(settings.covariance)

    def train_with_it(config, base, dataset, place, **surroundings) -> Outcome:
        return train(config, base, dataset, covariance, place, **surroundings)

    return run_from_settings(settings, train_with_it, progress, ranks)
