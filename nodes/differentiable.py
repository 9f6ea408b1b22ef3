"""Gradients through the networks that the host keeps, leaving nothing on them.

The host makes weights in inference mode, and autograd refuses such tensors. An ordinary tensor over the same memory is
accepted: it takes a weight's place while a gradient is computed, costs no memory, and goes again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.lora import LowRankDelta
from .switchable_lora import RunCache

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def ordinary(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd accepts and asks no gradient of; call it outside inference mode."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor  # packed weights of the host are unpacked, and so copied, where they are used
    if not tensor.is_inference():
        return tensor.detach()
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@contextmanager
def differentiable(*networks: nn.Module) -> Iterator[None]:
    """Let gradients pass through networks of the host for the time of the body, which is outside inference mode."""
    replaced = []
    try:
        for network in networks:
            for module in network.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in list(tensors.items()):
                        if tensor is not None:
                            tensors[name] = alias = ordinary(tensor)
                            replaced.append((tensors, name, tensor, alias))
        yield
    finally:
        for tensors, name, tensor, alias in reversed(replaced):
            if tensors.get(name) is alias:  # the host's weight hooks put other weights in place
                tensors[name] = tensor


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """Keep of a UNet's blocks only their inputs until the backward pass, which has to run inside the body.

    Without it a gradient at 1024 x 1024 pixels needs more memory than most cards have, and in low-VRAM mode every
    weight that was brought to the device would stay there.
    """
    blocks = [module for module in network.modules() if isinstance(module, (ResBlock, BasicTransformerBlock))]
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(_recomputed, block, block.forward)
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _recomputed(block: nn.Module, forward, *args, **kwargs) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # A recomputation must see the adapters and the position in the UNet of its own forward pass, not later ones.
    hooks = {
        module: {name: dict(getattr(module, name)) for name in _HOOKS}
        for module in block.modules()
        if module._forward_hooks or module._forward_pre_hooks
    }
    args, kwargs = ([_copied(value) for value in args], {name: _copied(value) for name, value in kwargs.items()})
    return checkpoint(
        partial(_under_hooks, hooks, forward), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _under_hooks(hooks: dict[nn.Module, dict[str, dict]], forward, *args, **kwargs) -> Tensor:
    before = {module: {name: getattr(module, name) for name in _HOOKS} for module in hooks}
    try:
        for module, tables in hooks.items():
            module.__dict__.update(tables)
        return forward(*args, **kwargs)
    finally:
        for module, tables in before.items():
            module.__dict__.update(tables)


@contextmanager
def keeping_inputs(network: nn.Module) -> Iterator[None]:
    """Let the norms of a transformer of the host look at copies: its layers then add to the originals in place."""
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    handles = [norm.register_forward_pre_hook(lambda _norm, inputs: (inputs[0].clone(),)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class DifferentiableCache(RunCache):
    """A run's cache for passes with a gradient: LoRA files, too, are read in inference mode."""

    def get(self, key, make, size, device):
        return super().get(key, lambda: _ordinary_parts(make()), size, device)


def _ordinary_parts(made: Any) -> Any:
    if isinstance(made, LowRankDelta):
        return replace(
            made,
            down=ordinary(made.down),
            up=ordinary(made.up),
            mid=None if made.mid is None else ordinary(made.mid),
        )
    return tuple(None if part is None else ordinary(part) for part in made)


def differentiable_attention(_chosen, *args, **kwargs) -> Tensor:
    """For the host's ``optimized_attention_override``: not every attention a user may have chosen has a gradient."""
    return attention_pytorch(*args, **kwargs)


class FixedControl:
    """A ControlNet of a conditioning, taken as constant in the latent; its gradient would cost another network's."""

    def __init__(self, control):
        self.control = control

    def get_control(self, x: Tensor, *args):
        """Named by the host: residuals by the UNet's part, {"input": [tensor or None, ...], ...}."""
        with torch.inference_mode():
            residuals = self.control.get_control(x.detach(), *args)
        return residuals and {
            part: [None if tensor is None else ordinary(tensor) for tensor in tensors]
            for part, tensors in residuals.items()
        }
