"""Sharpness-aware minimization, the optimizer that the authors of DVAR compare AdamW with."""

from collections.abc import Callable

import torch
from torch import Tensor


def sharpness_aware_step(
    optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor], rho: float = 0.05, *, adaptive: bool = False
) -> Tensor:
    """One step with the gradient at the worst point within ``rho`` (arXiv 2010.01412; adaptive: 2102.11600).

    w + ρ s²g / ‖sg‖, with s = |w| where adaptive and 1 elsewhere, and the norm over all parameters. The authors'
    training passes a closure that reuses the old graph, so that the second gradient is the first one.

    Args:
        optimizer: takes the step from where the weights were; its parameters need gradients of their own.
        closure: forward pass -> loss; called twice on the same batch.

    Returns:
        The loss before the step, without gradient.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = _gradients(optimizer, closure)
    with torch.no_grad():
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        before = [parameter.clone() for parameter in moved]
        scaled = [p.abs() * p.grad if adaptive else p.grad for p in moved]
        norm = torch.stack([gradient.norm() for gradient in scaled]).norm() + 1e-12
        for parameter, gradient in zip(moved, scaled, strict=True):
            parameter.add_(gradient * (parameter.abs() if adaptive else 1) * (rho / norm))
    _gradients(optimizer, closure)
    with torch.no_grad():
        for parameter, old in zip(moved, before, strict=True):
            parameter.copy_(old)
    optimizer.step()
    return loss


def _gradients(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> Tensor:
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = closure()
        loss.backward()
    return loss.detach()
