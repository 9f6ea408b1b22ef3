"""What is trained and how it moves: parameter groups, optimizer and schedule, gradients clipped and averaged."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.errors import ConfigError, MissingDependencyError
from .config import TrainConfig
from .ranks import Ranks

SHARPNESS_AWARE = ("sam", "adaptive_sam")
"""Optimizers that take two gradients per step, the second at the worst point near the weights."""


@dataclass(frozen=True)
class ParameterGroup:
    """Trained tensors that share a learning rate."""

    name: str
    parameters: dict[str, torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that cannot be used.

    Raises:
        MissingDependencyError: it is not installed.
        ConfigError: it takes two gradients per step, which a loss scale that adapts to overflows does not allow.
    """
    if config.optimizer == "adamw8bit":
        _adamw8bit()
    if config.optimizer in SHARPNESS_AWARE and config.precision == "fp16":
        raise ConfigError(f"optimizer {config.optimizer!r} cannot train in fp16; set precision to bf16 or fp32")


def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingDependencyError(
            "optimizer 'adamw8bit' needs the package bitsandbytes, which is not installed; install it or use 'adamw'"
        ) from error
    return AdamW8bit


def make_optimizer(config: TrainConfig, groups: Sequence[ParameterGroup], ranks: Ranks) -> torch.optim.Optimizer:
    """AdamW over the groups, in 8 bits when asked for; MissingDependencyError without bitsandbytes.

    Sharpness-aware minimization steps with momentum and without weight decay, as the authors of DVAR use it.
    """
    scale = 1.0
    if config.scale_learning_rate:
        scale = config.batch_size * config.gradient_accumulation * ranks.count
    settings = [
        {"params": list(g.parameters.values()), "lr": g.learning_rate * scale, "weight_decay": g.weight_decay}
        for g in groups
    ]
    if config.optimizer in SHARPNESS_AWARE:
        plain = [{**group, "weight_decay": 0.0} for group in settings]
        return torch.optim.SGD(plain, momentum=config.sam_momentum)
    optimizer = torch.optim.AdamW if config.optimizer == "adamw" else _adamw8bit()
    return optimizer(settings, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int):
    """The learning-rate schedule, counted in optimizer steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_cycles,
        power=config.lr_power,
    )


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of all tensors so that their common norm is at most ``max_norm``; returns the old norm."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(with_gradient, max_norm or math.inf)


def average_gradients(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """One exchange for all tensors: a LoRA has a thousand small ones."""
    flat = torch.cat([(t.grad if t.grad is not None else torch.zeros_like(t)).flatten() for t in tensors])
    parts = ranks.mean(flat).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.grad = part.view_as(tensor)
