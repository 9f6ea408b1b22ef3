"""LoRA on diffusers UNets and transformers text encoders, through peft: attach, switch off, read back."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.errors import FormatError, IncompatibleModelError
from ..models.lora import LowRankDelta

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of the UNet's attention layers."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same in CLIP text encoders."""
_TEXT_MODEL = "text_model."
"""Published names of text encoder layers start so; transformers 5 left it out of one of its two classes."""


def add_lora(
    model: nn.Module, rank: int, targets: Sequence[str], generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """Attach a trainable LoRA of scale 1 to every layer whose name ends in one of ``targets``.

    A starts from a normal distribution of standard deviation 1/rank, as peft's "gaussian", drawn from
    ``generator`` (CPU); B starts at zero, so that the model's output does not change. Both are float32
    whatever the model's type. Returns the parameters by name.
    """
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=list(targets)))
    parameters = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
        parameter.requires_grad_(True)
        parameters[name] = parameter
    return parameters


def set_lora(
    model: nn.Module, deltas: Mapping[str, LowRankDelta], *, adapter: str = "default", strength: float = 1.0
) -> None:
    """Attach a finished LoRA, frozen like the rest and switched on; a further one needs another ``adapter`` name.

    Args:
        deltas: by module name, as published files spell them.
        strength: factor on the whole change.

    Raises:
        IncompatibleModelError: the model lacks a layer, or has it in another size.
        FormatError: a Tucker-decomposed convolution, which peft has no layer for.
    """
    from peft import LoraConfig

    modules = dict(model.named_modules())
    deltas = {_own_name(modules, name): delta for name, delta in deltas.items()}
    for name, delta in deltas.items():
        if delta.mid is not None:
            raise FormatError(
                f"the LoRA holds a Tucker-decomposed convolution ({name}), which only ComfyUI can load; sample there"
            )
        weight = getattr(modules.get(name), "weight", None)
        expected = None if weight is None else (weight.shape[1], weight.shape[0])
        if expected != (delta.down.shape[1], delta.up.shape[0]):
            raise IncompatibleModelError(
                f"the LoRA changes layer {name} of size {delta.down.shape[1]} to {delta.up.shape[0]}, the model "
                f"{'has no such layer' if expected is None else f'has {expected[0]} to {expected[1]}'}; "
                "load the base model it was trained on"
            )
    ranks = {name: delta.rank for name, delta in deltas.items()}
    usual = max(set(ranks.values()), key=[*ranks.values()].count, default=1)
    # peft tries every entry of a pattern on every layer, as a regular expression: half a minute for all of SDXL.
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=list(deltas), rank_pattern=others, alpha_pattern=others
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # two LoRAs are meant
        model.add_adapter(config, adapter_name=adapter)
    with torch.no_grad():
        for name, module in model.named_modules():
            if delta := deltas.get(name):
                down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                down.copy_(delta.down.reshape(down.shape))
                up.copy_(delta.up.reshape(up.shape).to(up.dtype) * (delta.scale * strength))
    model.set_adapter(list(model.peft_config))  # peft leaves only the newest one on
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _own_name(modules: Mapping[str, nn.Module], published: str) -> str:
    """A layer's name in the model itself."""
    short = published.removeprefix(_TEXT_MODEL)
    return short if published not in modules and short in modules else published


@contextmanager
def lora_off(*models: nn.Module) -> Iterator[None]:
    """Run the models without their adapters; the weights underneath are never touched.

    Must not be open during a backward pass: gradient checkpointing would recompute without the adapters.
    Models that have none are left as they are.
    """
    # peft's own disable_adapters also rewrites every requires_grad, at twenty times the cost in every step.
    layers = [m for model in models for m in model.modules() if getattr(m, "_disable_adapters", None) is False]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def only_adapters(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Run a model with these of its adapters alone, for instance one of two LoRAs; names it lacks do not count."""
    attached = list(getattr(model, "peft_config", {}))
    wanted = [name for name in attached if name in adapters]
    if not wanted:
        with lora_off(model):
            yield
    elif wanted == attached:
        yield
    else:
        model.set_adapter(wanted)
        try:
            yield
        finally:
            model.set_adapter(attached)


def read_lora(model: nn.Module, root: str) -> dict[str, LowRankDelta]:
    """Copies of the attached LoRA on the CPU, under published names that start with ``root``.

    Args: root: ``unet``, ``text_encoder`` or ``text_encoder_2``.
    """
    deltas = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = (_copy(side["default"].weight) for side in (module.lora_A, module.lora_B))
            prefix = "" if root == "unet" or name.startswith(_TEXT_MODEL) else _TEXT_MODEL
            deltas[f"{root}.{prefix}{name}"] = LowRankDelta(down, up, float(module.scaling["default"]))
    return deltas


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def with_prefix_removed(deltas: Mapping[str, LowRankDelta], root: str) -> dict[str, LowRankDelta]:
    """The entries of one model, ``unet.`` or ``text_encoder.``, under its own module names."""
    start = f"{root}."
    return {name[len(start) :]: replace(delta) for name, delta in deltas.items() if name.startswith(start)}
