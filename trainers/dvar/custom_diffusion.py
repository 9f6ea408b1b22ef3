"""Custom Diffusion: weights of cross-attention, beside new words (arXiv 2212.04488)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...models.custom_diffusion import (
    FORMAT,
    CustomDiffusion,
    Part,
    compressed,
    is_trained,
    write_authors_file,
    write_custom_diffusion,
)
from ...models.dvar.custom_diffusion import first_token_detached, masked_prior_loss
from ...models.dvar.rescaling import CELL, PREFIXES, rescaled
from ...models.errors import ConfigError
from ...models.formats import describe, refuse_taken
from ...models.learned_embeddings import LearnedEmbedding
from ...models.lora import LowRankDelta
from ..base import TrainingBase
from ..batches import LatentBatch
from ..checkpoint import newest_states
from ..config import build
from ..dataset import Dataset
from ..outcome import Outcome
from ..output import OutputPlace, narrowed, rows_of_tokens, save_embeddings
from ..pictures import Cut
from ..preparation import run_from_settings
from ..prepared import Prepared
from ..progress import Progress
from ..ranks import Ranks
from .config import CustomDiffusionConfig, CustomDiffusionRun
from .train import Method, train_method


class RandomSizes:
    """Cuts at random sizes, with the mask of what they show; a mask of the cut itself is not carried over."""

    def __init__(self, variants: int) -> None:
        self.variants = variants

    def __call__(self, cut: Cut, generator: torch.Generator) -> tuple[Cut, str]:
        picture = ((cut.pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        made = rescaled(
            Image.fromarray(picture.contiguous().numpy()),
            cut.pixels.shape[-1],
            lambda low, high: int(torch.randint(low, high, (), generator=generator)),
        )
        mask = made.mask
        if not mask.any():  # too small for a margin; a mask of nothing would make the loss undefined
            mask = (made.pixels != 0).any(0).float().unflatten(1, (-1, CELL)).unflatten(0, (-1, CELL)).amax((1, 3))
        mask = mask.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1).unsqueeze(0)
        return replace(cut, pixels=made.pixels, mask=mask), made.prefix


def learning_rate(config: CustomDiffusionConfig, dataset: Dataset) -> float:
    """The authors double the rate where there are class pictures, whether or not it is scaled."""
    return config.learning_rate * (2 if dataset.class_examples else 1)


def attach_cross_attention(unet: nn.Module, part: Part = "keys_values") -> dict[str, nn.Parameter]:
    """Make weights of cross-attention trainable, in float32, by name.

    The first token of keys and values passes no gradient on.
    """
    parameters = {}
    for name, module in unet.named_modules():
        for which, parameter in list(module.named_parameters(recurse=False)):
            if is_trained(f"{name}.{which}", part):
                trained = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                setattr(module, which, trained)
                parameters[f"{name}.{which}"] = trained
        if is_trained(f"{name}.weight"):
            module.register_forward_hook(lambda projection, given, output: first_token_detached(output))
    return parameters


def custom_loss(
    config: CustomDiffusionConfig, prediction: Tensor, target: Tensor, batch: LatentBatch, weights: Tensor | None
) -> Tensor:
    """The masked loss, four times a mean, and the class pictures' by its weight; timesteps have none."""
    mask = batch.masks
    if mask is None:
        mask = torch.ones_like(batch.latents[:, :1])
    loss, prior = masked_prior_loss(prediction, target, mask.to(prediction.device), len(prediction) - len(batch.draws))
    return loss + (config.prior_loss_weight - 1) * prior


def train(
    config: CustomDiffusionConfig, base: TrainingBase, dataset: Dataset, place: OutputPlace, **surroundings: Any
) -> Outcome:
    """Train weights of cross-attention, and the dataset's tokens if it has any; as for train_method."""
    if config.snr_gamma:
        raise ConfigError("Custom Diffusion's masked loss has no weights of timesteps; set snr_gamma to 0")
    if config.save_authors_file:
        resumed = config.resume and bool(newest_states(place.run_folder))
        refuse_taken(place.lora_path.with_suffix(".bin"), overwrite=place.overwrite or resumed)
    own: dict[str, Tensor] = {}
    """The base's weights, of which a compressed file holds the changes."""

    def attach(prepared: Prepared) -> dict[str, nn.Parameter]:
        parameters = attach_cross_attention(prepared.unet, config.trained)
        if config.kept_share < 1:
            own.update({name: p.detach().to("cpu", copy=True) for name, p in parameters.items() if p.ndim == 2})
        return parameters

    method = Method(
        lambda prepared: save_custom_diffusion(prepared, own),
        attach=attach,
        loss=custom_loss,
        rate=learning_rate,
        augmentation=RandomSizes(config.rescale_variants) if config.rescale_variants else None,
        prefixes=tuple(prefix for pair in PREFIXES.values() for prefix in pair),
    )
    return train_method(method, config, base, dataset, place, **surroundings)


def save_custom_diffusion(prepared: Prepared, own: Mapping[str, Tensor]) -> list[Path]:
    """The weights with the tokens in one file, the authors' file where asked for, and one embedding file per token.

    Args: own: the base's weights, by name, of which the change is saved in a compressed form.
    """
    config, tokens, place = prepared.config, prepared.dataset.tokens, prepared.place
    rows = prepared.text.rows()
    dtype = torch.float16 if config.save_precision == "fp16" else torch.float32
    weights, changes = {}, {}
    for name, parameter in prepared.unet.named_parameters():
        if name in own:
            change = compressed(parameter.detach() - own[name].to(parameter), config.kept_share)
            changes[name] = LowRankDelta(narrowed(change.down, dtype), narrowed(change.up, dtype))
        elif is_trained(name, config.trained):
            weights[name] = narrowed(parameter.detach(), dtype)
    learned = tuple(LearnedEmbedding(token.trigger, part) for token, part in rows_of_tokens(rows, tokens))
    changed = CustomDiffusion(weights, learned, changes)
    about = {
        "family": prepared.base.family.name,
        "method": "custom-diffusion",
        "title": place.name,
        "config": config.as_dict(),
        "extra": prepared.around.metadata,
    }
    metadata = describe(FORMAT, tokens=tokens, kind="custom-diffusion", **about)
    written = [write_custom_diffusion(place.lora_path, changed, metadata, overwrite=prepared.overwrite)]
    if config.save_authors_file:
        path = place.lora_path.with_suffix(".bin")
        written.append(write_authors_file(path, changed, overwrite=prepared.overwrite))
    return [*written, *save_embeddings(place, rows, tokens, overwrite=prepared.overwrite, **about)]


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``custom-diffusion`` recipe; values as in custom_diffusion.example.toml."""
    return run_from_settings(build(CustomDiffusionRun, values), train, progress, ranks)
