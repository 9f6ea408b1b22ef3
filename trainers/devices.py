"""Number formats and memory of the device that training runs on."""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from ..models.errors import ConfigError, TrainingError
from .config import Precision, TrainConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The settings with precision "auto" replaced by what suits the device; ConfigError for what it lacks."""
    if config.optimizer == "adamw8bit" and device.type != "cuda":
        raise ConfigError(f"optimizer adamw8bit needs an NVIDIA GPU, and this training runs on {device}; choose adamw")
    return replace(config, precision=resolve_precision(config.precision, device))


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision itself, or for "auto" what suits the device."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if _computes_bf16(device) else "fp16"


def _computes_bf16(device: torch.device) -> bool:
    """Whether a GPU has bfloat16 arithmetic; torch's own question also says yes where it is slowly emulated."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """Type of the frozen weights; ConfigError where the device cannot train in it."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU, and this training runs on the CPU; choose fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not _computes_bf16(device):
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory did not suffice; only CUDA's has a type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        phrase in str(error) for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )


def reset_peak_memory(device: torch.device) -> None:
    """Count the device's largest allocation from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """Return what is no longer referenced to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
