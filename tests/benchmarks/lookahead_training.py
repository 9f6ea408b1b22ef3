"""An iteration of the face encoder's training as we do it, against the authors' order of work on the same weights.

The authors (OrLichter/lcm-lookahead, train_encoder.py) hold four UNets: the encoder's, the denoiser's, one under the
LCM LoRA, and the pipeline's own, from which the third is fused and copied anew whenever the LoRA's strength changes.
They encode pictures in every iteration and prompts in both of its halves. Written here from that description, on the
trainer's own parts; what is left out, CLIP-Vision in both halves and reading the LoRA's file again, would slow them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from dco_step import PeakMemory
from pairs import Pair, time_pairs
from torch import Tensor

from comfyui_personalize.models.lookahead import Resampler
from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder
from comfyui_personalize.models.lora import LowRankDelta
from comfyui_personalize.trainers.adapters import ATTENTION
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.lookahead.identity_attention import IdentityAttention
from comfyui_personalize.trainers.lookahead.starting import PROJECTIONS
from comfyui_personalize.trainers.lookahead.step import (
    Rows,
    denoise,
    last_block,
    look_ahead,
    noise_term,
    trained_parameters,
)
from comfyui_personalize.trainers.optimizer import clip_gradients
from comfyui_personalize.trainers.text import PromptEncoder

RANK = 4
CONTEXT_TOKENS, WIDTH = 17, 64
"""Of the picture's hidden states."""
STRENGTH_EVERY = 5
"""Iterations between new strengths of the LCM LoRA, as in the authors' command."""
RATE = 1e-5


def make_encoder(unet, rank: int = RANK) -> LookaheadEncoder:
    """A random adapter, and LoRAs where a training adds them."""
    context = unet.config.cross_attention_dim
    widths = {
        name.removesuffix(".attn1.to_k"): module.weight.shape[0]
        for name, module in unet.named_modules()
        if name.endswith(".attn1.to_k")
    }
    last = last_block(widths)

    def delta(name: str) -> LowRankDelta:
        outputs, inputs = unet.get_submodule(name).weight.shape
        return LowRankDelta(torch.randn(rank, inputs) / rank, torch.zeros(outputs, rank))

    sizes = {"dim": WIDTH, "tokens": 4, "depth": 2, "inner_dim": 2 * WIDTH, "hidden_dim": 2 * WIDTH}
    return LookaheadEncoder(
        resampler=Resampler(picture_dim=WIDTH, output_dim=context, **sizes),
        adapter={block: (torch.randn(w, context) / w, torch.randn(w, context) / w) for block, w in widths.items()},
        lora={
            name: delta(name)
            for block in widths
            if block != last
            for name in (f"{block}.{attention}.{one}" for attention in ("attn1", "attn2") for one in PROJECTIONS)
        },
        copies={block: (delta(f"{block}.attn1.to_k"), delta(f"{block}.attn1.to_v")) for block in widths},
        name="benchmark",
        metadata={},
    )


def make_lcm_lora(unet) -> dict[str, LowRankDelta]:
    """A small random LoRA on attention, in the LCM LoRA's place."""
    shapes = {name: module.weight.shape for name, module in unet.named_modules() if name.endswith(ATTENTION)}
    return {name: LowRankDelta(torch.randn(4, i) / i, torch.randn(o, 4) / 16) for name, (o, i) in shapes.items()}


@dataclass
class Work:
    """What an iteration runs: rows of UNets, prompts in text encoders, pictures in the VAE."""

    unets: int
    unet_rows: int = 0
    text_passes: int = 0
    vae_pictures: int = 0

    def __str__(self) -> str:
        unets = f"{self.unets} UNet{'s' if self.unets > 1 else ''}"
        return f"{unets}, {self.unet_rows} rows, {self.text_passes} text passes, {self.vae_pictures} VAE"


class _Job:
    """The parts that both ways share, from one seed."""

    def __init__(self, base: TrainingBase, side: int, batch: int, device: torch.device):
        torch.manual_seed(0)
        self.base, self.side, self.batch, self.device = base, side, batch, device
        self.schedule, self.work, self.iterations = base.noise_schedule(), Work(0), 0
        self.vae = base.load_vae(torch.float32, device)
        self.text = PromptEncoder(base.family, base.load_text_encoders(torch.float32, device), base.tokenizer())
        self.pixels = torch.rand(2 * batch, 3, side, side) * 2 - 1  # targets, then references
        self.prompts = [f"a photo of a face, number {number}" for number in range(batch)]
        self.features = torch.randn(batch, CONTEXT_TOKENS, WIDTH)
        self.vae.module.encoder.register_forward_pre_hook(self._count_vae)

    def _count_vae(self, _module, arguments) -> None:
        self.work.vae_pictures += len(arguments[0])

    def unet(self):
        """One more UNet of the base."""
        unet = self.base.load_unet(torch.float32, self.device).requires_grad_(False)
        self.work.unets += 1
        unet.register_forward_pre_hook(self._count_rows, with_kwargs=True)
        return unet

    def _count_rows(self, _module, arguments, _keywords) -> None:
        self.work.unet_rows += len(arguments[0])

    def optimize(self, identity: IdentityAttention, resampler: Resampler) -> None:
        self.resampler = resampler.to(self.device)
        own, adapter = trained_parameters(identity, self.resampler)
        self.own, self.trained = [*own.values()], [*own.values(), *adapter.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)

    def latents(self) -> Tensor:
        with torch.no_grad():
            mean, std = self.vae.encode_moments(self.pixels)
        return mean + std * torch.randn_like(mean)

    def told(self) -> Conditioning:
        self.work.text_passes += len(self.prompts) * len(self.base.text_encoders)
        with torch.no_grad():
            encoded = self.text.encode_frozen(self.prompts)
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]] * self.batch)
        return Conditioning(encoded.embeds, encoded.pooled, sizes)

    def rows(self, latents: Tensor, told: Conditioning, reference_told: Conditioning) -> Rows:
        targets, references = latents.chunk(2)
        noise = torch.randn_like(targets)
        return Rows(targets, noise, references, told, reference_told, self.features, self.features[:1])

    def update(self, loss: Tensor, clipped: list[Tensor]) -> float:
        loss.backward()
        clip_gradients(clipped, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def picture_loss(self, pictures: Tensor) -> Tensor:
        return (pictures - self.pixels[self.batch :]).abs().mean()

    def times(self) -> Tensor:
        return torch.randint(1, self.schedule.timesteps, (self.batch,))


class Ours(_Job):
    """One UNet; pictures and prompts were encoded once."""

    def __init__(self, base: TrainingBase, side: int, batch: int, device: torch.device):
        super().__init__(base, side, batch, device)
        told, latents = self.told(), self.latents()
        del self.text
        self.known = self.rows(latents, told, told)
        unet = self.unet()
        encoder = make_encoder(unet)
        self.identity = IdentityAttention(unet, encoder, preview=make_lcm_lora(unet), trainable=True)
        self.optimize(self.identity, encoder.resampler)

    def iteration(self) -> None:
        """A denoising step and one that looks ahead."""
        for ahead in (False, True):
            times, strength = self.times(), 1.0 if self.iterations // STRENGTH_EVERY % 2 else 0.5
            noised = denoise(
                self.identity, self.resampler, self.schedule, self.known, times, preview_scale=ahead * strength
            )
            if ahead:
                _, pictures = look_ahead(self.schedule, noised, times, lambda one: self.vae.decode(one, clamp=False))
                self.update(strength * self.picture_loss(pictures), self.trained)
            else:
                target = self.schedule.target(self.known.latents, self.known.noise, times)
                self.update(noise_term("noise", noised.prediction, target, torch.ones(self.batch)), self.own)
        self.iterations += 1


class _Frozen:
    """The encoder's keys and values of one UNet given to another; what denoise calls."""

    def __init__(self, encoder: IdentityAttention, decoder: IdentityAttention):
        self.encode, self.adapter, self.predict = encoder.encode, encoder.adapter, decoder.predict


class Authors(_Job):
    """Four UNets; pictures and prompts encoded in every iteration, prompts in both halves."""

    def __init__(self, base: TrainingBase, side: int, batch: int, device: torch.device):
        super().__init__(base, side, batch, device)
        first, *others, self.pipeline = (self.unet() for _ in range(4))
        encoder = make_encoder(first)
        self.lora = make_lcm_lora(first)
        encoding = IdentityAttention(first, encoder, trainable=True)
        plain = replace(encoder, lora={}, copies=dict.fromkeys(encoder.copies, (None, None)))
        decoding, self.lcm = (IdentityAttention(unet, plain) for unet in others)
        self.halves = _Frozen(encoding, decoding), _Frozen(encoding, self.lcm)
        self.fused = 0.0
        self.optimize(encoding, encoder.resampler)

    @torch.no_grad()
    def fuse(self, strength: float) -> None:
        """The pipeline's UNet under the LoRA, and all of it copied into the third."""
        for name, delta in self.lora.items():
            change = delta.up @ delta.down * (delta.scale * (strength - self.fused))
            self.pipeline.get_submodule(name).weight.add_(change)
        self.fused = strength
        self.lcm.unet.load_state_dict(self.pipeline.state_dict())

    def iteration(self) -> None:
        """A denoising step and one that looks ahead."""
        latents = self.latents()
        for ahead, identity in enumerate(self.halves):
            strength = 1.0 if self.iterations // STRENGTH_EVERY % 2 else 0.5
            if ahead and self.iterations % STRENGTH_EVERY == 0:
                self.fuse(strength)
            known, times = self.rows(latents, self.told(), self.told()), self.times()
            noised = denoise(identity, self.resampler, self.schedule, known, times)
            if ahead:
                _, pictures = look_ahead(self.schedule, noised, times, lambda one: self.vae.decode(one, clamp=False))
                self.update(strength * self.picture_loss(pictures), self.trained)
            else:
                target = self.schedule.target(known.latents, known.noise, times)
                self.update(noise_term("noise", noised.prediction, target, torch.ones(self.batch)), self.own)
        self.iterations += 1


JOBS = {"ours": Ours, "authors": Authors}
BATCH = 2


def measure(checkpoint: Path, side: int, rounds: int) -> tuple[Pair, dict[str, Work]]:
    """Seconds of an iteration both ways, and what each runs."""
    base = open_base(checkpoint)
    ours, theirs = (job(base, side, BATCH, torch.device("cpu")) for job in JOBS.values())
    work = {}
    for name, one in zip(JOBS, (ours, theirs), strict=True):
        one.work = Work(one.work.unets)
        one.iteration()
        work[name] = replace(one.work)  # timing goes on counting
    return time_pairs(ours.iteration, theirs.iteration, rounds), work


def measure_memory(which: str, checkpoint: str, side: int) -> None:
    """Print the peak memory in MiB of a few iterations, models and optimizer included; for a process of its own."""
    base = open_base(Path(checkpoint))
    base.tokenizer()
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from peft import LoraConfig  # noqa: F401

    with PeakMemory() as peak:
        job = JOBS[which](base, side, BATCH, torch.device("cpu"))
        for _ in range(3):
            job.iteration()
    print(json.dumps({"peak_mib": peak.bytes / 2**20}))
