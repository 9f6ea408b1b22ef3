"""The models of a face encoder's training, loaded one after the other and attached to one UNet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.errors import FormatError, IncompatibleModelError
from ...models.faces import face_analyser
from ...models.lookahead import Resampler
from ...models.lookahead.word import WordHead
from ...models.lora import LowRankDelta, parse_lora
from ...models.schedules import NoiseSchedule
from ..adapters import with_prefix_removed
from ..base import TrainingBase, load_other_vae
from ..clip_vision import load_clip_vision
from ..conditioning import Conditioning
from ..devices import dtype_of, free_memory
from ..progress import Cancelled, Progress
from ..text import PromptEmbeds, PromptEncoder
from ..vae import Autoencoder
from ..weights import Weights
from .config import LookaheadConfig, LookaheadModels
from .data import FaceData
from .identity_attention import IdentityAttention
from .losses import Loss
from .pictures import PictureReader
from .starting import start_encoder
from .words import WordPrompts

_PROMPTS = 8
"""How many are encoded at a time."""


class Told:
    """The prompts of a training, encoded once."""

    def __init__(self, prompts: Sequence[str], embeds: PromptEmbeds, side: int, device: torch.device):
        """Args: side: of the pictures, which SDXL is told."""
        self._places = {prompt: place for place, prompt in enumerate(prompts)}
        self._embeds, self._side, self._device = embeds, float(side), device

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of some of them, a row each, on the device."""
        return self.sized(self._embeds[[self._places[prompt] for prompt in prompts]].to(self._device))

    def sized(self, told: PromptEmbeds) -> Conditioning:
        """Conditioning of other encodings."""
        sizes = [self._side, self._side, 0, 0, self._side, self._side]
        return Conditioning(told.embeds, told.pooled, torch.tensor([sizes] * len(told), device=self._device))


@dataclass(frozen=True)
class Loaded:
    """What a training works with, on its device."""

    identity: IdentityAttention
    """The one UNet, with the encoder and the LCM LoRA attached."""
    resampler: Resampler
    """In float32."""
    reader: PictureReader
    decoder: Autoencoder
    """Of previews."""
    schedule: NoiseSchedule
    told: Told
    losses: dict[str, tuple[float, Loss]]
    """On previews; empty where the training never looks ahead."""
    head: WordHead | None
    words: WordPrompts | None
    """Predicts a word for the person, in float32, and reads it; None where that is not trained."""

    def tell(self, prompts: Sequence[str]) -> Callable[[Tensor], Conditioning] | None:
        """For denoise: these prompts with the word of the features' people; None where no word is predicted."""
        if self.words is None:
            return None
        return lambda features: self.told.sized(self.words(prompts, self.head(features, self.words.widths)))


def load(
    config: LookaheadConfig,
    base: TrainingBase,
    models: LookaheadModels,
    data: FaceData,
    *,
    prompts: Sequence[str],
    device: torch.device,
    generator: torch.Generator,
    progress: Progress,
    losses: Callable[[PictureReader], dict[str, tuple[float, Loss]]],
) -> Loaded:
    """Load everything; prompts are encoded first, and the text encoders leave again.

    Args:
        losses: makes those on previews.

    Raises:
        Cancelled: the user wants to stop; asked between the models.
        FormatError: a file is damaged or something else.
        IncompatibleModelError: files do not belong together.
    """
    dtype, side = dtype_of(config.precision, device), config.resolution or base.family.resolution
    tokenizer = base.tokenizer()
    faces = face_analyser(models.face_models) if models.face_models else None
    deltas = _preview_lora(models, base) if config.lookahead_every else {}
    _next(progress, "encoding prompts")
    text = PromptEncoder(base.family, base.load_text_encoders(dtype, device), tokenizer)
    told = Told(prompts, _encoded(text, prompts, progress), side, device)
    words = WordPrompts(text, tokenizer) if config.predict_word else None
    del text
    free_memory(device)
    _next(progress, "loading the autoencoder and CLIP-Vision")
    vae = base.load_vae(torch.float32, device)
    decoder = load_other_vae(models.preview_vae, base.family, dtype, device) if models.preview_vae else vae
    reader = PictureReader(
        vae,
        load_clip_vision(models.clip_vision, dtype, device),
        side=side,
        crop=config.crop,
        faces=faces,
        crop_heads=data.settings.crop_heads,
        memory=config.cache_gigabytes,
    )
    _next(progress, "loading the losses")
    made = losses(reader) if config.lookahead_every else {}
    _next(progress, "loading the UNet")
    unet = base.load_unet(dtype, device).requires_grad_(False)
    encoder = start_encoder(
        models.start, unet, lora_rank=config.lora_rank, copy_rank=config.copy_rank, generator=generator
    )
    found, wanted = reader.nobody.shape[-1], encoder.resampler.picture_dim
    if found != wanted:
        raise IncompatibleModelError(
            f"{models.clip_vision.name} gives hidden states of {found} numbers, {encoder.name} reads {wanted}; choose "
            "the CLIP-Vision model that it was trained with (1280 means ViT-H)"
        )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    identity = IdentityAttention(unet, encoder, preview=deltas, trainable=True)
    resampler = encoder.resampler.to(device, torch.float32)
    head = None
    if words is not None:
        features = unet.config.block_out_channels[-1]
        head = encoder.word or WordHead.draw(features, sum(words.widths), generator)
        head = head.to(device, torch.float32).requires_grad_(True)
    _next(progress, "training")
    return Loaded(identity, resampler, reader, decoder, base.noise_schedule(), told, made, head, words)


def _encoded(text: PromptEncoder, prompts: Sequence[str], progress: Progress) -> PromptEmbeds:
    """The prompts' encodings, between some of which the user may cancel: there can be one for every picture."""
    parts = []
    for first in range(0, len(prompts), _PROMPTS):
        _next(progress, "encoding prompts", first, len(prompts))
        parts.append(text.encode_frozen(prompts[first : first + _PROMPTS], _PROMPTS))
    return PromptEmbeds.join(parts)


def _next(progress: Progress, doing: str, done: int = 0, total: int = 1) -> None:
    if progress.cancelled():
        raise Cancelled
    progress.report(done, total, doing)


def _preview_lora(models: LookaheadModels, base: TrainingBase) -> dict[str, LowRankDelta]:
    """The LCM LoRA by the UNet's module names; errors unless it fits the base."""
    path = models.lcm_lora
    weights = Weights.open(path)
    deltas = parse_lora(weights.read(weights.shapes), path.name, layers_per_block=base.layers_per_block)
    deltas = with_prefix_removed(deltas, "unet")
    if not deltas:
        raise FormatError(f"{path.name}: holds no LoRA of a UNet; choose the LCM LoRA for {base.family.label}")
    modules = {name: module for name, module in base.unet.build().named_modules() if hasattr(module, "weight")}
    for name, delta in deltas.items():
        if not _fits(delta, modules.get(name)):
            raise IncompatibleModelError(
                f"{path.name}: made for another model than {base.name}, whose {name} is of another size or not there; "
                f"choose the LCM LoRA for {base.family.label}"
            )
    return deltas


def _fits(delta: LowRankDelta, module: nn.Module | None) -> bool:
    weight: Tensor | None = getattr(module, "weight", None)
    return weight is not None and (delta.up.shape[0], delta.down.shape[1]) == tuple(weight.shape[:2])
