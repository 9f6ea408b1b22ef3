"""The optimizer of the small world's networks: Muon for matrices and convolutions, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1 by Newton-Schulz steps.

    The quintic's coefficients are those of Muon (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum steps made orthogonal, for parameters of two or more dimensions; AdamW's scale of learning rates.

    Parameters of one shape are handled together, since calls cost more than arithmetic in tiny networks. Kept
    here because torch's own takes two-dimensional parameters only and computes in bfloat16.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[tuple(parameter.shape)].append(parameter)
            updates = []
            for parameters in shapes.values():
                buffers = [self._buffer(parameter) for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates.append(torch.stack([update.flatten(1) for update in nesterov]))
            for parameters, update in zip(shapes.values(), _orthogonalize_together(updates)):
                # Root mean square 0.2 like AdamW's steps (Liu et al. 2025).
                size = 0.2 * max(update.shape[1:]) ** 0.5
                matrices = list(update.reshape(len(parameters), *parameters[0].shape))
                torch._foreach_add_(parameters, matrices, alpha=-group["lr"] * size)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _orthogonalize_together(stacks: list[Tensor]) -> list[Tensor]:
    """Orthogonalize stacks of matrices; processes that train together do every n-th matrix each and exchange them."""
    if not dist.is_initialized():
        return [orthogonalized(stack) for stack in stacks]
    mine, count = dist.get_rank(), dist.get_world_size()
    flat = torch.zeros(sum(stack.numel() for stack in stacks))
    results = [part.view_as(stack) for part, stack in zip(flat.split([stack.numel() for stack in stacks]), stacks)]
    first = 0  # matrices go round over all stacks, as many of these hold one matrix only
    for stack, result in zip(stacks, results):
        chosen = slice((mine - first) % count, None, count)
        if stack[chosen].numel():
            result[chosen] = orthogonalized(stack[chosen])
        first += len(stack)
    dist.all_reduce(flat)
    return results
