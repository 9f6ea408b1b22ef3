"""Pictures from a trained DCO LoRA, with or without reward guidance, without ComfyUI."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...models.errors import ConfigError, TrainingError
from ...models.tokens import LearnedToken, check_distinct, replace_triggers
from ..adapters import only_adapters, set_lora, with_prefix_removed
from ..base import TrainingBase, open_base
from ..captions import clean, tokens_in
from ..conditioning import Conditioning
from ..config import build
from ..devices import autocast, dtype_of, free_memory, is_out_of_memory, resolve_precision
from ..outcome import CANCELLED
from ..personalization import Personalization, open_personalization
from ..progress import Cancelled, FollowerProgress, Progress, SilentProgress
from ..ranks import Ranks
from ..sampling import Predict, Reward, euler, guided, rewarded, sample, to_pictures
from ..saved_pictures import refuse_existing, save_png
from ..settings import pick_device
from ..text import PromptEncoder
from ..vae import LATENT_CHANNELS, PIXELS_PER_LATENT
from .sample_config import PLAIN, DCOSampleRun, SampleConfig, StyleSettings

ADAPTERS = ("lora", "style")
"""Names of the first and of the second LoRA on the models."""


def sample_pictures(
    config: SampleConfig,
    base: TrainingBase,
    personalizations: Sequence[Personalization],
    *,
    device: torch.device,
    seeds: Sequence[int],
    style: StyleSettings | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (seed, picture) one by one; the text encoders are released before the UNet is loaded.

    Args:
        personalizations: one or two, the second being the style.
        seeds: of the pictures to make; a picture depends on its own seed alone.
        style: says how the second acts; None lets both act together.

    Raises:
        PersonalizeError: a prompt or a file does not fit, or the device has too little memory.
        Cancelled: the user stopped; the pictures yielded so far are complete.
    """
    progress = progress or SilentProgress()
    base_prompt = base_prompt_of(config, [token for item in personalizations for token in item.tokens])
    precision = resolve_precision(config.precision, device)
    dtype = dtype_of(precision, device)
    width, height = config.width or base.family.resolution, config.height or base.family.resolution
    own_term = style is not None and style.reward_scale != PLAIN and config.reward_scale != PLAIN
    try:
        progress.report(0, 1, "encoding prompts")
        text = _TextSide(base, personalizations, dtype, device, height=height, width=width)
        off = config.reward_scale != PLAIN
        uncond = text.encode(config.negative_prompt, () if off else ADAPTERS)
        plain_text = text.encode(base_prompt, ())
        personalized = text.encode(config.prompt, ADAPTERS[:1] if own_term else ADAPTERS)
        styled = text.encode(style.prompt or config.prompt, ADAPTERS[1:]) if own_term else None
        del text
        free_memory(device)
        _stop_if(progress)

        unet = base.load_unet(dtype, device)
        _attach(unet, "unet", personalizations)
        predict = _predictor(config, unet, uncond, plain_text, personalized, styled, style)
        vae = base.load_vae(dtype, device)
        scheduler = euler(base.noise_schedule())
        cells = (1, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        for index, seed in enumerate(seeds):
            noise = torch.randn(cells, generator=torch.Generator().manual_seed(seed)).to(device)
            with autocast(precision, device):
                for step, latents in enumerate(sample(scheduler, predict, noise, config.steps), start=1):  # noqa: B007
                    _stop_if(progress)
                    done, total = index * config.steps + step, len(seeds) * config.steps
                    progress.report(done, total, f"picture {index + 1} of {len(seeds)}")
            if not latents.isfinite().all():
                raise TrainingError(
                    f"the picture of seed {seed} is not a number in {precision}; use fp32 or bf16, or lower the scales"
                )
            with torch.no_grad():
                yield seed, to_pictures(vae.decode(latents.float()))[0]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory at {width} x {height} in {precision}; choose a smaller size, or bf16"
        ) from error


def base_prompt_of(config: SampleConfig, tokens: Sequence[LearnedToken]) -> str:
    """The prompt in ordinary words: as given, or with every token replaced by its initializer."""
    triggers = [token.trigger for token in tokens]
    if config.base_prompt:
        if found := tokens_in(config.base_prompt, triggers):
            raise ConfigError(
                f"sample.base_prompt contains the learned token {triggers[min(found)]}, which the base model does not "
                "know; write it in ordinary words"
            )
        return config.base_prompt
    for index in sorted(tokens_in(config.prompt, triggers)):
        if not tokens[index].initializer.strip():
            raise ConfigError(
                f"no ordinary word is known for {triggers[index]}; write sample.base_prompt, the prompt without tokens"
            )
    return clean(replace_triggers(config.prompt, {token.trigger: token.initializer for token in tokens}))


def _stop_if(progress: Progress) -> None:
    if progress.cancelled():
        raise Cancelled


class _TextSide:
    """Encodes single prompts under any of the text encoders' LoRAs."""

    def __init__(
        self,
        base: TrainingBase,
        personalizations: Sequence[Personalization],
        dtype: torch.dtype,
        device: torch.device,
        *,
        height: int,
        width: int,
    ) -> None:
        self._encoders = base.load_text_encoders(dtype, device)
        self._dtype, self._device = dtype, device
        for index, encoder in enumerate(self._encoders):
            _attach(encoder, "text_encoder" if index == 0 else f"text_encoder_{index + 1}", personalizations)
        tokens = [token for item in personalizations for token in item.tokens]
        rows = None
        if tokens:
            widths = {
                slot.key: encoder.get_input_embeddings().weight.shape[1]
                for slot, encoder in zip(base.family.encoders, self._encoders)
            }
            parts = [item.token_rows(widths) for item in personalizations if item.tokens]
            rows = {key: torch.cat([part[key] for part in parts]) for key in widths}
        self._prompts = PromptEncoder(base.family, self._encoders, base.tokenizer(), tokens, rows=rows)
        self._time_ids = None
        if base.family.size_conditioning:
            self._time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device)

    def encode(self, prompt: str, adapters: Sequence[str]) -> Conditioning:
        """A prompt's conditioning with these LoRAs on; those that a text encoder lacks do not count."""
        with ExitStack() as stack:
            for encoder in self._encoders:
                stack.enter_context(only_adapters(encoder, adapters))
            embeds = self._prompts.encode_frozen([prompt]).to(self._device, self._dtype)
        return Conditioning(embeds.embeds, embeds.pooled, self._time_ids)


def _attach(model: nn.Module, root: str, personalizations: Sequence[Personalization]) -> None:
    for adapter, item in zip(ADAPTERS, personalizations):
        if deltas := with_prefix_removed(item.deltas, root):
            strength = item.settings.strength if root == "unet" else item.settings.text_strength
            set_lora(model, deltas, adapter=adapter, strength=strength)


def _predictor(
    config: SampleConfig,
    unet: nn.Module,
    uncond: Conditioning,
    base: Conditioning,
    personalized: Conditioning,
    styled: Conditioning | None,
    style: StyleSettings | None,
) -> Predict:
    if config.reward_scale == PLAIN:
        return guided(unet, uncond, base, personalized, text_scale=config.text_scale, rescale=config.rescale)
    first = () if styled is None else ADAPTERS[:1]
    rewards = [Reward(personalized, config.reward_scale, first)]
    if styled is not None:
        rewards.append(Reward(styled, style.reward_scale, ADAPTERS[1:]))
    return rewarded(unet, uncond, base, rewards, text_scale=config.text_scale, rescale=config.rescale)


def run(values: dict[str, Any], progress: Progress, ranks: Ranks) -> int:
    """The command line's ``dco-sample`` recipe; values as in sample.example.toml."""
    settings = build(DCOSampleRun, values)
    config, output = settings.sample, settings.output
    device = pick_device(settings.device)
    seeds = [config.seed + index for index in range(config.count)]
    if not output.overwrite:
        refuse_existing([output.path(seed) for seed in seeds])
    base = open_base(settings.base.path, vae=settings.base.vae or None, tokenizer=settings.base.tokenizer or None)
    chosen = [settings.lora] if settings.style is None else [settings.lora, settings.style]
    personalizations = [
        open_personalization(item, base.family, layers_per_block=base.layers_per_block) for item in chosen
    ]
    check_distinct([token for item in personalizations for token in item.tokens])
    pictures = sample_pictures(
        config,
        base,
        personalizations,
        device=device,
        seeds=seeds[ranks.index :: ranks.count],
        style=settings.style,
        progress=progress if ranks.is_writer else FollowerProgress(progress),
    )
    try:
        for seed, picture in pictures:
            texts = picture_texts(settings, base, personalizations, seed)
            print(f"\nsaved {save_png(output.path(seed), picture, texts, overwrite=output.overwrite)}")
    except Cancelled:
        print("\ncancelled; the pictures saved so far are complete")
        return CANCELLED
    return 0


def picture_texts(
    settings: DCOSampleRun, base: TrainingBase, personalizations: Sequence[Personalization], seed: int
) -> dict[str, str]:
    """Text entries of a picture's file: everything that is needed to make it again."""
    made_with = asdict(settings.sample) | {"seed": seed, "count": 1}
    made_with["base_model"] = base.label
    for adapter, item in zip(ADAPTERS, personalizations):
        made_with[adapter] = {"file": item.name, "strength": item.settings.strength}
        made_with[adapter]["text_strength"] = item.settings.text_strength
    if settings.style is not None:
        made_with["style"] |= {"reward_scale": settings.style.reward_scale, "prompt": settings.style.prompt}
    return {
        "Software": "ComfyUI-Personalize",
        "Description": settings.sample.prompt,
        "personalize.sample": json.dumps(made_with, ensure_ascii=False),
    }
