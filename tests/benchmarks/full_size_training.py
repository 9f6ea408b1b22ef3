"""Memory of the face encoder's training at SDXL's true size, term by term, computed without any data.

Weights are counted on the meta device. Activations are what is alive there during a step of the trainer's own parts,
backward pass and recomputations included: every operation's result is followed from its making to its end, so the
peak is that of an allocator without gaps.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from comfyui_personalize.models.lookahead import Resampler
from comfyui_personalize.models.lookahead.arcface import ArcFace
from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder
from comfyui_personalize.models.lora import LowRankDelta
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.lookahead.identity_attention import PREVIEW, IdentityAttention
from comfyui_personalize.trainers.lookahead.starting import PROJECTIONS
from comfyui_personalize.trainers.lookahead.step import (
    Rows,
    denoise,
    last_block,
    look_ahead,
    noise_term,
    trained_parameters,
)

CARD = 24 * 10**9
"""Bytes of the card that the training is to fit; cards of 24 GB have a little more."""
RESERVED = 600 * 10**6
"""Bytes that CUDA's own context and libraries take; an estimate, the only one here."""
HALVES = "denoising", "looking ahead"
SIDE, CONTEXT, POOLED = 1024, 2048, 1280
RESAMPLER = {"picture_dim": 1280, "output_dim": 2048, "dim": 1280, "tokens": 16, "depth": 4}
RESAMPLER |= {"inner_dim": 1280, "hidden_dim": 5120}
"""Of ip-adapter-plus-face_sdxl_vit-h."""
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 14, "projection_dim": 1024}
ARCFACE_STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))
"""Channels and units of IR-SE50."""
LCM_RANK = 64
LCM_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""What the published LCM LoRA changes."""


class Alive(TorchDispatchMode):
    """Counts the bytes of everything made while it is open, for as long as it lives."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        """Args: resident: made before; a linear layer's transposed view of its weight is nothing new."""
        super().__init__()
        self.bytes = self.peak = 0
        self._resident = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in resident)}
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen or key in self._resident:
            return

        def ended(_) -> None:
            self.bytes -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, ended)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """What autocast to bfloat16 does on a GPU, for the meta device, which has none, in recomputations too.

    Attention is that of the fast kernel: the meta device's own would make whole attention matrices.
    """

    def casting(function, dtype: torch.dtype):
        def cast(value):
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return lambda *args, **settings: function(*tree_map(cast, args), **tree_map(cast, settings))

    def attention(query, key, value, **_settings):
        return torch.ops.aten._scaled_dot_product_flash_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())[0]

    replaced = {name: casting(getattr(F, name), torch.bfloat16) for name in ("linear", "conv2d")}
    replaced |= {name: casting(getattr(F, name), torch.float32) for name in ("layer_norm", "group_norm")}
    with mock.patch.multiple(F, scaled_dot_product_attention=attention, **replaced):
        yield


@dataclass
class Memory:
    """Bytes of a training, by what they are for."""

    resident: dict[str, int]
    """What stays through the whole training, but for the optimizer's states."""
    trained: int
    """Numbers that are trained, in float32."""
    kept: dict[str, int]
    """Half of an iteration -> activations that wait for its backward pass."""
    peak: dict[str, int]
    """Half of an iteration -> the most that it needs besides what stays: those, a block recomputed, and gradients."""
    reading: int
    """The most that encoding a picture needs, which happens when it is met."""

    @property
    def states(self) -> int:
        """Of AdamW."""
        return 8 * self.trained

    @property
    def update(self) -> int:
        """What AdamW's step needs: the gradients and one more list of tensors of their size, activations being gone."""
        return 8 * self.trained

    @property
    def total(self) -> int:
        """At the worst moment."""
        worst = max(*self.peak.values(), self.reading, self.update)
        return sum(self.resident.values()) + self.states + worst + RESERVED

    @property
    def total_in_8_bits(self) -> int:
        """The same with the optimizer's states in a byte each."""
        return self.total - self.states * 3 // 4


def measure(checkpoint: Path, batch: int) -> Memory:
    """Account for a training in bf16 with gradient checkpointing, the authors' ranks and the loss ``identity``.

    Args:
        checkpoint: a base whose weights are never read, such as full_size.write_hollow writes.
    """
    base = open_base(checkpoint)
    unet = base.unet.build().to(torch.bfloat16).requires_grad_(False)
    unet.enable_gradient_checkpointing()
    unet.train()
    vae = base.vae.build().requires_grad_(False).train(False)
    with torch.device("meta"):
        encoder, preview = _encoder(unet), _lcm_lora(unet)
        vision, tiny, face = _vision(), _taesd(), _arcface()
        identity = IdentityAttention(unet, encoder, preview=preview, trainable=True)
    loras = [name for name, _ in unet.named_modules() if name.endswith((f"lora_A.{PREVIEW}", f"lora_B.{PREVIEW}"))]
    for name in loras:
        unet.get_submodule(name).to(torch.bfloat16)  # peft gives a LoRA its layer's dtype, except on the meta device
    own, adapter = trained_parameters(identity, encoder.resampler)
    trained = [*own.values(), *adapter.values()]
    lora = [weight for name in loras for weight in unet.get_submodule(name).parameters()]
    known = {id(one) for one in (*trained, *lora)}
    resident = {
        "UNet, bf16": _size(weight for weight in unet.parameters() if id(weight) not in known),
        "LCM LoRA of rank 64, bf16": _size(lora),
        "CLIP-Vision ViT-H, bf16": _size(vision.parameters()),
        "autoencoder, fp32": _size(vae.parameters()),
        "TAESD, bf16": _size(tiny.parameters()),
        "face network, fp32": _size(face.parameters()),
        "encoder's LoRA and copies of rank 4, fp32": _size(own.values()),
        "resampler, fp32": _size(encoder.resampler.parameters()),
        "adapter's keys and values, fp32": _size(adapter.values()) - _size(encoder.resampler.parameters()),
    }
    models = unet, encoder.resampler, vae, tiny, face
    weights = [*trained, *(weight for model in models for weight in model.parameters())]
    kept, peak = {}, {}
    schedule, rows, times = base.noise_schedule(), _rows(batch), torch.full((batch,), 500)
    for half in HALVES:
        ahead = half != HALVES[0]
        with Alive(weights) as alive:
            with cuda_autocast():
                denoised = denoise(
                    identity, encoder.resampler, schedule, rows, times, preview_scale=1.0 if ahead else 0.0
                )
            if ahead:
                _, pictures = look_ahead(schedule, denoised, times, lambda x: tiny.decoder(x.bfloat16()).float())
                faces = F.interpolate(pictures, (face.size, face.size), mode="bilinear")
                loss = 1 - (face(faces) * torch.empty(batch, 512, device="meta")).sum(1).mean()
                del pictures, faces
            else:
                target = schedule.target(rows.latents, rows.noise, times)
                loss = noise_term("noise", denoised.prediction, target, torch.ones(batch))
            del denoised
            kept[half] = alive.bytes
            with cuda_autocast():
                loss.backward()
            peak[half] = alive.peak
        for weight in trained:
            weight.grad = None
    with (
        Alive(weights) as alive,
        torch.no_grad(),
        mock.patch.object(F, "scaled_dot_product_attention", _full_attention),
    ):
        vae.encode(torch.empty(1, 3, SIDE, SIDE, device="meta"))
    return Memory(resident, sum(weight.numel() for weight in trained), kept, peak, alive.peak)


def _full_attention(query: Tensor, key: Tensor, value: Tensor, **_settings) -> Tensor:
    """The fast kernel in float32, which makes no attention matrix either."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False)[0]


def _size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _delta(module: nn.Module, rank: int) -> LowRankDelta:
    outputs, inputs, *kernel = module.weight.shape
    return LowRankDelta(torch.empty(rank, inputs, *kernel), torch.empty(outputs, rank, *(1 for _ in kernel)))


def _encoder(unet: nn.Module, rank: int = 4) -> LookaheadEncoder:
    keys = {name.removesuffix(".attn1.to_k"): m for name, m in unet.named_modules() if name.endswith(".attn1.to_k")}
    last = last_block(keys)
    names = [
        f"{block}.{attention}.{one}"
        for block in keys
        if block != last
        for attention in ("attn1", "attn2")
        for one in PROJECTIONS
    ]
    adapter = {block: tuple(torch.empty(len(m.weight), CONTEXT) for _ in range(2)) for block, m in keys.items()}
    copies = {block: (_delta(module, rank), _delta(module, rank)) for block, module in keys.items()}
    lora = {name: _delta(unet.get_submodule(name), rank) for name in names}
    return LookaheadEncoder(Resampler(**RESAMPLER), adapter, lora, copies, "hollow", {})


def _lcm_lora(unet: nn.Module) -> dict[str, LowRankDelta]:
    return {name: _delta(m, LCM_RANK) for name, m in unet.named_modules() if f".{name}".endswith(LCM_LAYERS)}


def _vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).to(torch.bfloat16)


def _taesd() -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny().to(torch.bfloat16).requires_grad_(False).train(False)


def _arcface() -> nn.Module:
    units, inputs = [], 64
    for channels, count in ARCFACE_STAGES:
        for number in range(count):
            units.append((inputs, channels, channels // 16, 1 if number else 2, inputs != channels))
            inputs = channels
    return ArcFace(units, 512, 7).requires_grad_(False).train(False)


def _rows(batch: int) -> Rows:
    cells = SIDE // 8
    with torch.device("meta"):
        latents, noise, reference = (torch.empty(batch, 4, cells, cells) for _ in range(3))
        sizes = torch.empty(batch, 6)
        told = Conditioning(torch.empty(batch, 77, CONTEXT), torch.empty(batch, POOLED), sizes)
        features = torch.empty(batch, 257, VISION["hidden_size"])
        return Rows(latents, noise, reference, told, told, features, features[:1])


def rows_of(memories: Sequence[Memory]) -> list[str]:
    """Table rows, a column for each: what stays, what single moments need besides, and the sum at the worst of them.

    Args:
        memories: that of batch 1 first.
    """

    def row(name: str, size: Callable[[Memory], int]) -> str:
        return f"| {name} | {' | '.join(f'{size(one) / 1e9:.2f}' for one in memories)} |"

    lines = [row(name, lambda one, name=name: one.resident[name]) for name in memories[0].resident]
    lines.append(row("AdamW's two states, fp32", lambda one: one.states))
    lines.append(row("CUDA's own, estimated", lambda one: RESERVED))
    for half in HALVES:
        lines.append(row(f"moment: {half}, backward pass", lambda one, half=half: one.peak[half]))
        lines.append(row("of it activations that waited for it", lambda one, half=half: one.kept[half]))
    lines.append(row("moment: AdamW's step, gradients and as much again", lambda one: one.update))
    lines.append(row("moment: encoding a picture", lambda one: one.reading))
    first = memories[0].peak[HALVES[1]]
    totals = {
        "": lambda one: one.total,
        ", with `adamw8bit`": lambda one: one.total_in_8_bits,
        ", with `lookahead_batch_size` 1": lambda one: replace(one, peak=one.peak | {HALVES[1]: first}).total,
    }
    for setting, total in totals.items():
        fits = ("yes" if total(one) <= CARD else "no" for one in memories)
        lines.append(row(f"**all that stays, and the worst moment{setting}**", total))
        lines.append(f"| fits {CARD / 1e9:g} GB{setting} | {' | '.join(fits)} |")
    return lines
