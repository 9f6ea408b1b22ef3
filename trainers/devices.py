"""Number formats and memory of the device that training runs on."""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from ..models.errors import ConfigError, TrainingError
from .config import Precision, TrainConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The settings with precision "auto" replaced by what suits the device."""
    if config.precision != "auto":
        return config
    choice: Precision = "fp32"
    if device.type == "cuda":
        choice = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return replace(config, precision=choice)


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """Type of the frozen weights; ConfigError where the device cannot train in it."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU, and this training runs on the CPU; choose fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision bf16 is not supported by this GPU; choose fp16 or fp32")
    return _DTYPES[precision]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Run the forward pass in the precision's type, with operations that need it in float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def out_of_memory(config: TrainConfig, when: str) -> TrainingError:
    """The error to raise when the device's memory does not suffice: what was running and what to lower."""
    without = "" if config.gradient_checkpointing else " and no gradient checkpointing"
    return TrainingError(
        f"out of memory {when} with batch size {config.batch_size}, {config.precision}{without}; lower the batch "
        "size, the resolution or the rank, turn on gradient checkpointing, or train in bf16"
    )


def free_memory(device: torch.device) -> None:
    """Return what is no longer referenced to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
