"""Switchable LoRA in the host: evaluated beside the frozen weights, on or off for every row of a batch.

Nothing is written into the model that all clones share. Each adapter is a wrapper of the UNet's forward that
hooks the leaf modules it changes for the time of one call; which rows it applies to is told by tags on the
conditioning, found again through the uuid that the host gives every conditioning.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import comfy.lora
import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..models.errors import IncompatibleModelError
from .lora_layers import LayerPatch

KEY = "personalize_switchable_lora"
"""Key of our wrappers on a MODEL."""
TAG = "personalize_loras"
"""Entry of a conditioning: {adapter id: factor}. Adapters that it leaves out are off; without it all are on."""
_TAGS, _RUN = "personalize_lora_tags", "personalize_lora_run"  # entries of the host's transformer_options

Span = tuple[int, int, float]
"""Rows [start, stop) of a batch that share one factor."""


class RunCache:
    """What is made once for a sampling run, so that nothing of ours outlives it on the device."""

    def __init__(self) -> None:
        self._entries: dict[Any, Any] = {}
        self._spare: dict[torch.device, int] = {}
        self._modules: dict[tuple[str, nn.Module], list[nn.Module]] = {}

    def __deepcopy__(self, memo: dict) -> "RunCache":
        return self

    def get(self, key: Any, make: Callable[[], Any], size: Callable[[Any], int], device: torch.device) -> Any:
        """The entry under ``key``, made when missing; kept only while the device has memory to spare."""
        if key in self._entries:
            return self._entries[key]
        if device not in self._spare:  # asking the driver takes longer than a layer does
            memory = comfy.model_management
            self._spare[device] = memory.get_free_memory(device) - memory.minimum_inference_memory()
        made = make()
        needed = size(made)
        if needed < self._spare[device]:
            self._spare[device] -= needed
            self._entries[key] = made
        return made

    def modules(self, adapter: "SwitchableLora", unet: nn.Module) -> list[nn.Module]:
        """The modules that an adapter changes, in the order of its layers; a run on several GPUs has several UNets."""
        key = (adapter.id, unet)
        if key not in self._modules:
            self._modules[key] = [unet.get_submodule(name) for name in adapter.layers]
        return self._modules[key]


class SwitchableLora:
    """One adapter: a wrapper of the UNet's forward. Holds no state of a run, so clones and threads may share it."""

    def __init__(self, name: str, layers: Mapping[str, LayerPatch], strength: float):
        self.id = uuid.uuid4().hex
        self.name = name
        self.layers = dict(layers)
        self.strength = strength

    def __deepcopy__(self, memo: dict) -> "SwitchableLora":
        return self

    def __call__(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        """Run the UNet with this adapter on for the rows that want it; x is (rows, channels, height, width)."""
        options = call_options(args, kwargs)
        spans = self.spans(x.shape[0], options)
        if not spans:
            return executor(x, *args, **kwargs)
        cache = options.get(_RUN) or RunCache()
        handles = []
        try:
            for (name, patch), module in zip(self.layers.items(), cache.modules(self, executor.class_obj)):
                hook = self._hook(name, patch, x.shape[0], spans, cache)
                handles.append(module.register_forward_hook(hook))
            return executor(x, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def spans(self, rows: int, options: Mapping[str, Any]) -> list[Span]:
        """Which of the batch's rows the adapter applies to, neighbours with one factor joined."""
        if not self.strength:
            return []
        tags, ids = options.get(_TAGS, {}), options.get("uuids") or [None]
        per_chunk = rows // len(ids)
        spans: list[Span] = []
        for chunk, chunk_id in enumerate(ids):
            factor = float(tags[chunk_id].get(self.id, 0.0)) if chunk_id in tags else 1.0
            start, stop = chunk * per_chunk, (chunk + 1) * per_chunk
            if factor and spans and spans[-1][1:] == (start, factor):
                spans[-1] = (spans[-1][0], stop, factor)
            elif factor:
                spans.append((start, stop, factor))
        return spans

    def _hook(self, name: str, patch: LayerPatch, rows: int, spans: list[Span], cache: RunCache) -> Callable:
        def add_change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0]
            change = self._change(name, patch, module, x, cache)
            # Patches of other extensions may fold tokens into the batch; its outer axis stays the row.
            repeat = output.shape[0] // rows
            if spans == [(0, rows, 1.0)]:
                return output + change(x)
            if output.requires_grad:
                output = output.clone()
            for start, stop, factor in spans:
                part = slice(start * repeat, stop * repeat)
                output[part] += change(x[part]) if factor == 1.0 else change(x[part]) * factor
            return output

        return add_change

    def _change(
        self, name: str, patch: LayerPatch, module: nn.Module, x: Tensor, cache: RunCache
    ) -> Callable[[Tensor], Tensor]:
        """The layer's change at full strength as a function of its input."""
        key = (self.id, name, x.device, x.dtype)
        if patch.low_rank is not None:
            scaled = replace(patch.low_rank, scale=patch.low_rank.scale * self.strength)
            delta = cache.get(key, lambda: scaled.to(x), lambda d: _bytes((d.down, d.up, d.mid)), x.device)
            return lambda rows: _low_rank(delta, module, rows)
        weight, bias = cache.get(key, lambda: self._dense(name, patch, module, x), _bytes, x.device)
        return lambda rows: _dense(module, rows, weight, bias)

    def _dense(self, name: str, patch: LayerPatch, module: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """ΔW and Δb from the host's own arithmetic on the weights as they are in force, strength included."""
        changes = []
        for parameter, change in (("weight", patch.weight), ("bias", patch.bias)):
            if change is None:
                changes.append(None)
                continue
            current = weight_in_force(module, parameter, x.device)
            patches = [(self.strength, change, 1.0, None, None)]
            patched = comfy.lora.calculate_weight(patches, current.clone(), f"{name}.{parameter}", torch.float32)
            changes.append((patched - current).to(x.dtype))
        return changes[0], changes[1]


def call_options(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The host's transformer_options in what follows x in a call of the UNet."""
    return kwargs.get("transformer_options") or (args[4] if len(args) > 4 else {})


def weight_in_force(module: nn.Module, parameter: str, device: torch.device) -> Tensor:
    """A module's weight or bias in float32, with the patches that low-VRAM mode applies while computing."""
    tensor = getattr(module, parameter).detach()
    if parameter == "weight" and hasattr(module, "convert_weight"):
        tensor = module.convert_weight(tensor)  # fp8 and other packed weights of the host
    tensor = tensor.to(device=device, dtype=torch.float32, copy=True)
    for function in getattr(module, f"{parameter}_function", ()):
        tensor = function(tensor)
    return tensor


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _low_rank(delta, module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return delta.conv2d(x, stride=module.stride, padding=module.padding, dilation=module.dilation)
    return delta.linear(x)


def _dense(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The layer's operation with ΔW and Δb in place of W and b; all four operations are linear in both."""
    if isinstance(module, nn.GroupNorm):
        zero = weight if weight is not None else torch.zeros_like(bias)
        return F.group_norm(x, module.num_groups, zero, bias, module.eps)
    if isinstance(module, nn.LayerNorm):
        zero = weight if weight is not None else torch.zeros_like(bias)
        return F.layer_norm(x, module.normalized_shape, zero, bias, module.eps)
    if weight is None:
        return bias.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else bias
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    return F.linear(x, weight, bias)


def require_unet(model, who: str = "switchable LoRAs need", instead: str = "use the Load LoRA node") -> None:
    """Raise IncompatibleModelError unless the MODEL is a UNet of the Stable Diffusion families."""
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel):
        raise IncompatibleModelError(
            f"{who} a UNet (SD1.5, SD2.1 or SDXL), but this model is a {type(network).__name__}; "
            f"load one of those checkpoints, or {instead} for this one"
        )


def attach(model, lora: SwitchableLora):
    """A clone of the MODEL with one more adapter at the end of its chain."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, lora)
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, _start_run), (WrappersMP.CALC_COND_BATCH, _carry_tags)):
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def chain(model) -> list[SwitchableLora]:
    """The adapters on a MODEL in the order of their loaders."""
    return list(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY))


def switched(loras: Iterable[SwitchableLora], factor: float = 1.0) -> dict[str, float]:
    """Tag that turns exactly these adapters on."""
    return {lora.id: factor for lora in loras}


def switched_on(options: Mapping[str, Any], lora: SwitchableLora | None, cache: RunCache) -> dict[str, Any]:
    """The host's transformer_options with one more adapter, which the MODEL does not carry, and a cache of its own.

    It is on in every row, but for rows with a tag that leaves it out.
    """
    options = {**options, _RUN: cache}
    if lora is None:
        return options
    wrappers = options.get("wrappers", {})
    of_unet = wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
    return {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: {**of_unet, lora.id: [lora]}}}


def tagged(cond: Mapping[str, Any], tag: Mapping[str, float], name: str) -> dict[str, Any]:
    """A copy of one converted conditioning with a switch, and with a uuid of its own.

    Where areas are used the host copies conditionings between lists, uuid included; without a fresh one,
    rows of two lists could not be told apart. It is derived from the old one so that it stays the same.
    """
    return {**cond, TAG: dict(tag), "uuid": uuid.uuid5(cond["uuid"], name)}


def _start_run(executor, guider, sigmas, extra_args, *args, **kwargs):
    extra_args["model_options"].setdefault("transformer_options", {})[_RUN] = RunCache()
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _carry_tags(executor, model, conds, x, timestep, model_options, *args, **kwargs):
    tags = {cond["uuid"]: cond[TAG] for entries in conds for cond in entries or () if TAG in cond}
    if tags:
        options = model_options.get("transformer_options", {})
        merged = {**options, _TAGS: {**options.get(_TAGS, {}), **tags}}
        model_options = {**model_options, "transformer_options": merged}
    return executor(model, conds, x, timestep, model_options, *args, **kwargs)
