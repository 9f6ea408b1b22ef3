"""LCM-Lookahead on a diffusers UNet: one network as encoder, denoiser and preview, by what each pass is given."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...models.errors import ConfigError
from ...models.lookahead.encoder import LookaheadEncoder
from ...models.lookahead.encoder_parts import KeyValueCopy
from ...models.lora import LowRankDelta
from ..adapters import set_lora
from ..conditioning import Conditioning, predict
from .identity_processors import (
    AttentionPass,
    IdentityProcessor,
    KeysValues,
    cross_attention,
    linear,
    self_attention,
)

ENCODER, PREVIEW = "encoder", "preview"
"""Names of the two LoRAs on the UNet."""


class IdentityAttention:
    """Binds an encoder to a frozen UNet whose weights stay as they are.

    Every method says all about its own pass, so encoder, denoising and preview passes may alternate, and gradients
    may be asked of them together: a recomputation under gradient checkpointing sees what its own forward pass saw.
    Called by itself, the UNet predicts as it did before.
    """

    def __init__(
        self,
        unet: nn.Module,
        encoder: LookaheadEncoder,
        *,
        preview: Mapping[str, LowRankDelta] | None = None,
        trainable: bool = False,
    ):
        """Attach the encoder, on the UNet's device.

        Args:
            unet: diffusers' UNet2DConditionModel, without LoRAs and frozen; where it is to use gradient
                checkpointing, with that enabled.
            preview: the LCM LoRA, by the UNet's module names.
            trainable: makes the encoder's own weights float32 leaves with gradient, in place of frozen ones in the
                UNet's dtype.

        Raises:
            ConfigError: the UNet carries LoRAs already.
            IncompatibleModelError: the encoder or the LoRA is for another model.
        """
        if found := list(getattr(unet, "peft_config", None) or {}):
            raise ConfigError(f"the UNet already carries the LoRAs {found}; attach the encoder to a UNet without any")
        encoder.check_fit({name.removesuffix(".weight"): value.shape for name, value in unet.state_dict().items()})
        self.unet = unet
        self.parameters: dict[str, nn.Parameter] = {}
        """The encoder's weights but for its resampler, under the names of the slim file."""
        self._encoder, self._trainable = encoder, trainable
        self._dtype, self._device = torch.float32 if trainable else unet.dtype, unet.device
        self._strengths: Mapping[str, float] = {}
        self._plain: list[tuple[nn.Module, Any]] = []
        self._checkpointing = unet.is_gradient_checkpointing
        try:
            self._attach(preview or {})
        except BaseException:
            self.detach()
            raise

    def _attach(self, preview: Mapping[str, LowRankDelta]) -> None:
        for name, deltas in ((ENCODER, self._encoder.lora), (PREVIEW, preview)):
            if deltas:
                set_lora(self.unet, deltas, adapter=name)
        for layer in _lora_layers(self.unet):
            layer._active_adapter = []
        self._lora = {module: self._own(f"lora.{module}", delta) for module, delta in self._encoder.lora.items()}
        for module, delta in self._lora.items():
            layer = self.unet.get_submodule(module)
            layer.lora_A[ENCODER].weight, layer.lora_B[ENCODER].weight = delta.down, delta.up
        self._adapter = self._own_pairs("adapter", self._encoder.adapter)
        self._copies = self._own_pairs("copies", self._encoder.copies)
        for block in self._adapter:
            for name, attend in (("attn1", self_attention), ("attn2", cross_attention)):
                attn = self.unet.get_submodule(f"{block}.{name}")
                self._plain.append((attn, attn.processor))
                attn.set_processor(IdentityProcessor(block, attn.processor, attend))
        if self._checkpointing:
            self.unet.enable_gradient_checkpointing(self._checkpoint)

    def _own_pairs(self, part: str, pairs: Mapping[str, tuple[KeyValueCopy, KeyValueCopy]]) -> dict[str, tuple]:
        return {
            block: (self._own(f"{part}.{block}.to_k", k), self._own(f"{part}.{block}.to_v", v))
            for block, (k, v) in pairs.items()
        }

    def _own(self, name: str, weight: KeyValueCopy) -> KeyValueCopy:
        """The same weight, of parameters of ours."""
        if weight is None:
            return None
        if isinstance(weight, LowRankDelta):
            down, up = weight.down, weight.up * weight.scale
            return LowRankDelta(self._parameter(f"{name}.down", down), self._parameter(f"{name}.up", up))
        return self._parameter(f"{name}.weight", weight)

    def _parameter(self, name: str, value: Tensor) -> nn.Parameter:
        value = value.detach().to(self._device, self._dtype, copy=True)
        self.parameters[name] = nn.Parameter(value, requires_grad=self._trainable)
        return self.parameters[name]

    def detach(self) -> None:
        """Give the UNet its own layers and attention back; the encoder's weights stay usable."""
        for attn, processor in self._plain:
            attn.set_processor(processor)
        self._plain = []
        if getattr(self.unet, "peft_config", None):
            self.unet.unload_lora()
        if self._checkpointing:
            self.unet.enable_gradient_checkpointing()

    @property
    def encoder(self) -> LookaheadEncoder:
        """The encoder with the weights in use, which training goes on changing."""
        return replace(self._encoder, adapter=self._adapter, lora=self._lora, copies=self._copies)

    def adapter(self, tokens: Tensor) -> KeysValues:
        """Keys and values of identity tokens, (batch, tokens, dim): the same in every step of a run."""
        return {block: (linear(tokens, k), linear(tokens, v)) for block, (k, v) in self._adapter.items()}

    def encode(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, *, middle: list[Tensor] | None = None
    ) -> KeysValues:
        """Keys and values of a reference for self-attention, by a pass of the UNet under the encoder's LoRA.

        Args:
            noisy: the reference's latents, (batch, channels, height, width), noised for ``timesteps``.
            middle: receives what the middle block returns, (batch, channels, height, width).
        """
        given = AttentionPass(copies=self._copies, captured={})
        hook = None
        if middle is not None:
            hook = self.unet.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(output))
        try:
            with self._running({ENCODER: 1.0}), _nothing_behind(self.unet, self._copies):
                self._predict(given, noisy, timesteps, conditioning)
        finally:
            # What a recomputation captures is of no use, and a graph that holds its own result is never freed.
            captured, given.captured = given.captured, None
            if hook is not None:
                hook.remove()
        return captured

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        *,
        adapter: KeysValues | None = None,
        adapter_scale: float | Tensor = 1.0,
        reference: KeysValues | None = None,
        preview: float = 0.0,
    ) -> Tensor:
        """The UNet's prediction, (batch, channels, height, width).

        Args:
            adapter: from the method of that name; None leaves it out.
            adapter_scale: one for all, or one per row, (batch,).
            reference: from ``encode``, perhaps with tokens dropped, and of any height and width; None leaves it out.
            preview: strength of the LCM LoRA; 0 switches it off.
        """
        if preview and PREVIEW not in (getattr(self.unet, "peft_config", None) or {}):
            raise ConfigError("a preview needs an LCM LoRA; give one when the encoder is attached")
        given = AttentionPass(reference=reference or {}, adapter=adapter or {}, adapter_scale=adapter_scale)
        with self._running({PREVIEW: preview} if preview else {}):
            return self._predict(given, noisy, timesteps, conditioning)

    def _predict(self, given: AttentionPass, *inputs) -> Tensor:
        return predict(partial(self.unet, cross_attention_kwargs={"identity": given}), *inputs)

    @contextmanager
    def _running(self, strengths: Mapping[str, float]) -> Iterator[None]:
        self._strengths = strengths
        try:
            with _adapters(self.unet, strengths):
                yield
        finally:
            self._strengths = {}

    def _checkpoint(self, module: Callable, *inputs) -> Any:
        """Gradient checkpointing of one layer: run now, and in the backward pass again under the same adapters."""
        strengths = self._strengths

        def run(*inputs):
            with _adapters(module, strengths):
                return module(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)


def drop_tokens(reference: KeysValues, kept: Mapping[str, Tensor]) -> KeysValues:
    """The reference with some of its tokens cut out, the same of keys and values and in all rows.

    Args:
        kept: block -> mask from kept_tokens, (1, tokens); of blocks that are not named all tokens stay.
    """
    left = dict(reference)
    for block, mask in kept.items():
        k, v = reference[block]
        indices = mask.flatten().nonzero().flatten().to(k.device)
        left[block] = k.index_select(1, indices), v.index_select(1, indices)
    return left


def _lora_layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if hasattr(layer, "lora_A")]


@contextmanager
def _adapters(module: nn.Module, strengths: Mapping[str, float]) -> Iterator[None]:
    """Run a module with these adapters alone, whichever were on."""
    # peft's own set_adapter also decides anew which parameters have gradients: a pass would lose those of another.
    before = [(layer, layer._active_adapter, dict(layer.scaling)) for layer in _lora_layers(module)]
    for layer, *_ in before:
        layer._active_adapter = list(strengths)
        for name, strength in strengths.items():
            layer.set_scale(name, strength)
    try:
        yield
    finally:
        for layer, active, scaling in before:
            layer._active_adapter = active
            layer.scaling.update(scaling)


@contextmanager
def _nothing_behind(unet: Any, blocks: Mapping[str, Any]) -> Iterator[None]:
    """Let the UNet's pass end with the last level that has one of these blocks; its result means nothing then."""
    levels = [int(block.split(".")[1]) for block in blocks if block.startswith("up_blocks.")]
    whole = {name: getattr(unet, name) for name in ("up_blocks", "conv_norm_out", "conv_out")}
    unet.up_blocks = unet.up_blocks[: max(levels, default=-1) + 1]
    unet.conv_norm_out, unet.conv_out = None, nn.Identity()
    try:
        yield
    finally:
        for name, module in whole.items():
            setattr(unet, name, module)
