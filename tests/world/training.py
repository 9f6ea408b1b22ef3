"""One training loop for all networks of the small world: seeded, resumable, on one or several CPU processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from optimizers import Muon
from torch import Tensor, nn

SAVE_EVERY = 120.0
"""Seconds between saved states."""
DEVICE_VARIABLE = "WORLD_DEVICE"
"""Of the environment, which the processes of a training share."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast a network is trained."""

    steps: int
    batch: int
    """Examples per step, over all processes."""
    lr: float
    warm_up: int = 100
    flat: float = 0.4
    """Share of the steps after which the rate begins to fall as a cosine."""
    ema: float = 0.999
    clip: float | None = None
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        progress = (step / self.steps - self.flat) / (1 - self.flat)
        return self.lr * (0.505 + 0.495 * math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def device() -> torch.device:
    """Where networks are trained; batches are drawn on the CPU, so that they are the same everywhere."""
    return torch.device(os.environ.get(DEVICE_VARIABLE, "cpu"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: hidden matrices and convolutions, not embeddings nor first and last layers."""
    outer = ("embedding", "conv_in", "conv_out", "time_emb", "add_embedding")
    return parameter.ndim >= 2 and min(parameter.shape[:2]) >= 8 and not any(part in name for part in outer)


class Average:
    """Exponential moving average of some weights, warming up so that the start is forgotten."""

    def __init__(self, parameters: list[Tensor], decay: float):
        self.decay = decay
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: list[Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in parameters], 1 - decay)


def fit(
    name: str,
    module: nn.Module,
    plan: Plan,
    loss_of: Callable[[int, torch.Generator], Tensor],
    work: Path,
    look: Callable[[int], str] | None = None,
    look_every: int = 500,
) -> None:
    """Train ``module`` in place on `device`, and leave it on the CPU with the averaged weights.

    A run that was stopped goes on from its last saved state; batches depend on seed and step alone.

    Args:
        name: of the state file in ``work`` and in the progress lines.
        loss_of: (examples of this process, generator of this step and process) -> loss; brings its batch to `device`.
        look: called with the step every ``look_every`` steps, in evaluation with the averaged weights; its text
            is printed.
    """
    module.to(device())
    named = dict(module.named_parameters())
    parameters = list(named.values())
    matrices = [parameter for key, parameter in named.items() if is_matrix(key, parameter)]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=plan.lr))
    average = Average(parameters, plan.ema)
    state_path = work / f"{name}.pt"
    first = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device(), weights_only=True)
        first = state["step"]
        module.load_state_dict(state["module"])
        average.weights = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    started = saved_at = time.monotonic()
    running = 0.0
    for step in range(first, plan.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
        generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + step) * 64 + rank())
        loss = loss_of(plan.batch // world_size(), generator)
        loss.backward()
        _share_gradients(parameters)
        if plan.clip is not None:
            nn.utils.clip_grad_norm_(parameters, plan.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(parameters, step)
        running = loss.item() if step == first else running + (loss.item() - running) * 0.02
        done = step + 1
        if rank() == 0 and (done % 100 == 0 or done == plan.steps):
            speed = (done - first) / (time.monotonic() - started)
            left = (plan.steps - done) / speed / 60
            rate = speed * plan.batch
            print(f"{name}: step {done}/{plan.steps} loss {running:.4f}, {rate:.0f}/s, {left:.1f} min left", flush=True)
        if rank() == 0 and (time.monotonic() - saved_at > SAVE_EVERY or done == plan.steps):
            saved_at = time.monotonic()
            state = {"step": done, "module": module.state_dict(), "average": average.weights}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, state_path.with_suffix(".partial"))
            os.replace(state_path.with_suffix(".partial"), state_path)
        if look is not None and rank() == 0 and (done % look_every == 0 or done == plan.steps):
            with torch.no_grad(), swapped(parameters, average.weights):
                module.to("cpu")
                print(f"{name}: step {done}: {look(done)}", flush=True)
                module.to(device())
    with torch.no_grad():
        torch._foreach_copy_(parameters, average.weights)
    module.to("cpu")


class swapped:  # noqa: N801 - reads as a verb where it is used
    """Other values in the parameters for the length of a with statement."""

    def __init__(self, parameters: Iterable[Tensor], values: Iterable[Tensor]):
        self.parameters, self.values = list(parameters), list(values)

    def __enter__(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.values)

    def __exit__(self, *_: object) -> None:
        torch._foreach_copy_(self.parameters, self.kept)


def _share_gradients(parameters: list[Tensor]) -> None:
    """Average the gradients over all processes with one exchange."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    first = 0
    for gradient in gradients:
        gradient.copy_(flat[first : first + gradient.numel()].view_as(gradient))
        first += gradient.numel()


def in_processes(count: int, work: Path, function: Callable[..., None], *arguments: object) -> None:
    """Run a function in several processes that train together, each on one core; in this one when count is 1."""
    # What a layer without gradient leaves in the optimizer decays into denormal numbers, which take ten times as long.
    torch.set_flush_denormal(True)
    if count == 1:
        function(*arguments)
        return
    meeting = work / "processes"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_process, (count, str(meeting), function, arguments), nprocs=count)


def _process(index: int, count: int, meeting: str, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=count)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
