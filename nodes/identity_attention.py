"""A face encoder's identity in the host's UNet, from hooks on leaf modules for the time of one call.

In an encoder pass the keys and values of a reference are kept, block by block; other rows have them joined to their
self-attention, and the adapter's tokens beside their cross-attention. Nothing is written into the shared model.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ..models.errors import ConfigError
from ..models.lookahead import append_or_repeat, for_batch, region_tokens
from ..models.lookahead.encoder import LookaheadEncoder
from ..models.lookahead.encoder_parts import KeyValueCopy
from ..models.lookahead.identity import Identity
from ..models.lora import LowRankDelta
from .identity_roles import ROLES, RUN, Role, Run
from .switchable_lora import call_options
from .unet_names import host_names

_NOTHING = Role()


class _AllKept(Exception):  # noqa: N818 - nothing went wrong
    """The encoder pass has nothing left to do: what follows the last block's keys is never read."""


class IdentityAttention:
    """A wrapper of the UNet's forward. What belongs to a run is in its `Run`, so clones and threads may share this."""

    def __init__(
        self,
        model,
        encoder: LookaheadEncoder,
        identity: Identity,
        *,
        adapter_scale: float,
        sharing_strength: float = 1.0,
        region: Tensor | None = None,
    ):
        self.encoder, self.identity = encoder, identity
        self.adapter_scale, self.sharing_strength = adapter_scale, sharing_strength
        self.region = region
        """(1 or batch, height, width) between 0 and 1, in any size."""
        names = host_names(model)
        order = [name for name, _ in model.model.diffusion_model.named_modules()]
        found = {block: names[f"{block}.attn1.to_k"].removesuffix(".attn1.to_k") for block in encoder.adapter}
        self.blocks = dict(sorted(found.items(), key=lambda item: order.index(item[1])))
        """Diffusers' name -> the host's, in the order of the forward pass."""

    def __deepcopy__(self, memo: dict) -> "IdentityAttention":
        return self

    def __call__(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        """Run the UNet; x is (rows, channels, height, width)."""
        options = call_options(args, kwargs)
        roles, run = options.get(ROLES), options.get(RUN)
        if not roles or run is None:
            return executor(x, *args, **kwargs)
        chunks = tuple(roles.get(chunk, _NOTHING) for chunk in options.get("uuids") or [None])
        with ExitStack() as hooks:
            call = _Call(self, executor.class_obj, chunks, run, hooks, x.shape, options)
            if any(role.keep for role in chunks):
                call.keep()
                try:
                    return executor(x, *args, **kwargs)
                except _AllKept:
                    return torch.zeros_like(x)
            if any(role.shared for role in chunks):
                call.share()
            if self.adapter_scale and any(role.tokens for role in chunks):
                call.adapt()
            return executor(x, *args, **kwargs)


@dataclass(frozen=True)
class _Call:
    """The hooks of one call of the UNet."""

    settings: IdentityAttention
    unet: nn.Module
    chunks: tuple[Role, ...]
    """Of the equal parts of the batch."""
    run: Run
    hooks: ExitStack
    shape: torch.Size
    """Of the latents, (rows, channels, height, width)."""
    options: dict[str, Any]
    """The host's transformer_options, in which other nodes may have put an attention of their own."""

    @property
    def batch(self) -> int:
        return self.shape[0] // len(self.chunks)

    def _module(self, block: str, rest: str) -> nn.Module:
        return self.unet.get_submodule(f"{self.settings.blocks[block]}.{rest}")

    def _after(self, module: nn.Module, hook: Callable) -> None:
        self.hooks.callback(module.register_forward_hook(hook).remove)

    def _before(self, module: nn.Module, hook: Callable, with_kwargs: bool = False) -> None:
        self.hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs).remove)

    # The encoder pass

    def keep(self) -> None:
        """Keep every block's keys and values, and end the pass when the last ones are kept."""
        last = list(self.settings.blocks)[-1]
        for block in self.settings.blocks:
            copies = self.settings.encoder.copies.get(block, (None, None))
            for position, (name, copy) in enumerate(zip(("to_k", "to_v"), copies)):
                ends = block == last and name == "to_v"
                self._after(self._module(block, f"attn1.{name}"), self._keeper(block, position, copy, ends))

    def _keeper(self, block: str, position: int, copy: KeyValueCopy, ends: bool) -> Callable:
        def keep(projection: nn.Module, args: tuple, _output: Tensor) -> None:
            (x,) = args
            if isinstance(copy, LowRankDelta):  # small enough to stay on the device for the run
                key = ("copy", block, position, x.dtype, x.device)
                taken = _project(projection, self.run.once(key, lambda: copy.to(x)), x)
            else:
                taken = _project(projection, copy, x)
            for role, rows in zip(self.chunks, taken.chunk(len(self.chunks))):
                if role.keep:
                    kept = self.run.references.setdefault(role.keep, {}).setdefault(block, [None, None])
                    pictures = rows.unflatten(0, (self.run.pictures, -1)).transpose(0, 1)
                    kept[position] = pictures.flatten(1, 2)  # (rows, pictures * tokens, heads * dim)
            if ends:
                raise _AllKept

        return keep

    # Self-attention

    def share(self) -> None:
        """Join the references to self-attention."""
        if (self.options.get("patches_replace") or {}).get("attn1"):
            raise ConfigError(
                "another node replaces self-attention (self-attention or perturbed-attention guidance do), which the "
                "shared reference needs as it is; disconnect that node, or set the mode to adapter only"
            )
        for block in self.settings.blocks:
            kept = [self.run.references[role.shared][block] if role.shared else None for role in self.chunks]
            for position, name in enumerate(("to_k", "to_v")):
                shared = [None if pair is None else pair[position] for pair in kept]
                self._after(self._module(block, f"attn1.{name}"), self._joiner(shared))
            length = next(pair[0].shape[1] for pair in kept if pair is not None)
            self._before(self._module(block, "attn1"), self._weigher(length), with_kwargs=True)

    def _needs_bias(self, tokens: int, length: int) -> bool:
        """Whether references fade, or rows without one cannot look at themselves twice instead."""
        if self.settings.sharing_strength != 1 or self.settings.region is not None:
            return True
        return bool(length % tokens) and not all(role.shared for role in self.chunks)

    def _joiner(self, shared: list[Tensor | None]) -> Callable:
        def join(_projection: nn.Module, _args: tuple, own: Tensor) -> Tensor:
            references = [None if reference is None else reference.to(own) for reference in shared]
            length = next(reference.shape[1] for reference in references if reference is not None)
            return append_or_repeat(own, references, repeat=not self._needs_bias(own.shape[1], length))

        return join

    def _weigher(self, length: int) -> Callable:
        def weigh(_attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = args[0]
            if not self._needs_bias(x.shape[1], length):
                return None
            key = ("bias", self.chunks, tuple(x.shape[:2]), length, x.dtype, x.device)
            kwargs["mask"] = self.run.once(key, lambda: self._bias(x, length))
            return args, kwargs

        return weigh

    def _bias(self, x: Tensor, length: int) -> Tensor:
        """What is added to the logits, (rows, tokens, tokens + length)."""
        strengths = [self.settings.sharing_strength if role.shared else 0.0 for role in self.chunks]
        fade = self._by_row(strengths, x).log().to(x.dtype)  # log 0: never seen
        bias = F.pad(fade.expand(-1, -1, length), (x.shape[1], 0))
        return bias.expand(-1, x.shape[1], -1)

    # Cross-attention

    def adapt(self) -> None:
        """Add the adapter's attention to cross-attention."""
        queries: dict[str, Tensor] = {}
        for block in self.settings.blocks:
            attention = self._module(block, "attn2")
            self._after(attention.to_q, _remember(queries, block))
            self._before(attention.to_out, self._adder(block, attention, queries))

    def _adder(self, block: str, attention: nn.Module, queries: dict[str, Tensor]) -> Callable:
        def add(_projection: nn.Module, args: tuple) -> tuple:
            q = queries.pop(block)
            like = (self.chunks, tuple(q.shape[:2]), q.dtype, q.device)
            k, v = self.run.once(("tokens", block, *like), lambda: self._tokens(block, q))
            scale = self.run.once(("scale", *like), lambda: self._scale(q))
            settings = {"attn_precision": attention.attn_precision, "transformer_options": self.options}
            seen = optimized_attention(q, k, v, attention.heads, **settings)
            return (args[0] + scale * seen,)

        return add

    def _tokens(self, block: str, q: Tensor) -> list[Tensor]:
        """The adapter's keys and values, (rows, identity tokens, heads * dim)."""
        tokens = self.settings.identity.tokens
        rows = torch.cat([for_batch(getattr(tokens, role.tokens or "uncond"), self.batch) for role in self.chunks])
        rows = rows.to(q.device, torch.float32)
        return [F.linear(rows, weight.to(rows)).to(q.dtype) for weight in self.settings.encoder.adapter[block]]

    def _scale(self, q: Tensor) -> float | Tensor:
        if self.settings.region is None and all(role.tokens for role in self.chunks):
            return self.settings.adapter_scale
        scales = [self.settings.adapter_scale if role.tokens else 0.0 for role in self.chunks]
        return self._by_row(scales, q).to(q.dtype)

    def _by_row(self, values: list[float], x: Tensor) -> Tensor:
        """A number of each chunk, within the region, for (rows, tokens, dim): (rows, tokens or 1, 1) in float32."""
        rows = torch.tensor(values, device=x.device).repeat_interleave(self.batch).reshape(-1, 1, 1)
        if self.settings.region is None:
            return rows
        shape = _feature_map(self.shape, x.shape[1])
        inside = [
            region_tokens(_within(self.settings.region, role.area, self.run.size), *shape) for role in self.chunks
        ]
        return rows * torch.cat([for_batch(one, self.batch) for one in inside]).to(x.device).unsqueeze(2)


def _feature_map(latents: torch.Size, tokens: int) -> tuple[int, int]:
    """Height and width of the layer that has this many tokens; each level of a UNet halves both."""
    height, width = latents[-2:]
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise ConfigError(
            f"a region cannot be placed in a layer with {tokens} tokens of {latents[-2]}×{latents[-1]} latents; "
            "disconnect the region, or the node that tiles attention"
        )
    return height, width


def _within(region: Tensor, area: tuple[int, ...] | None, size: tuple[int, int] | None) -> Tensor:
    """The part of a region, (batch, height, width), that lies in an area of the latent."""
    if area is None or size is None:
        return region
    height, width, top, left = area
    down, across = region.shape[1] / size[0], region.shape[2] / size[1]
    return region[
        :,
        round(top * down) : max(round((top + height) * down), 1),
        round(left * across) : round((left + width) * across),
    ]


def _remember(store: dict[str, Tensor], key: str) -> Callable:
    def remember(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        store[key] = output

    return remember


def _project(projection: nn.Module, copy: KeyValueCopy, x: Tensor) -> Tensor:
    """What a copy of a projection makes of its input, whatever LoRA the projection itself has on."""
    if isinstance(copy, Tensor):
        return F.linear(x, copy.to(x))
    own = type(projection).forward(projection, x)  # past its hooks, yet through the host's casts and patches
    return own if copy is None else own + copy.to(x).linear(x)
