"""Sharpness-aware minimization, the optimizer that the authors of DVAR compare AdamW with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def worst_point(parameters: Sequence[Tensor], rho: float, *, adaptive: bool = False) -> Iterator[None]:
    """Move the parameters within ``rho`` to where their gradients say that the loss is worst, and back on leaving.

    w + ρ s²g / ‖sg‖, with s = |w| where adaptive and 1 elsewhere, and the norm over all parameters (arXiv 2010.01412;
    adaptive: 2102.11600). A step of sharpness-aware minimization takes the gradient there, of the same batch, and
    goes from where the weights were. The authors' training evaluates no new graph there (yandex-research/DVAR,
    textual_inversion.py), so that their second gradient is the first one.

    Args:
        parameters: with their gradients; those without one stay where they are.
    """
    with torch.no_grad():
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        before = [parameter.clone() for parameter in moved]
        scales = [parameter.abs() if adaptive else torch.ones_like(parameter) for parameter in moved]
        norms = [(scale * parameter.grad).norm() for scale, parameter in zip(scales, moved, strict=True)]
        length = torch.stack(norms).norm() + 1e-12 if norms else 1.0
        for parameter, scale in zip(moved, scales, strict=True):
            parameter.add_(parameter.grad * scale.square() * (rho / length))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(moved, before, strict=True):
                parameter.copy_(old)
