"""The one training loop: accumulate, clip, step, report, stop, keep the best, checkpoint and resume."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..models.dvar.sharpness import worst_point
from ..models.errors import PersonalizeError, TrainingError
from .best import BestWeights
from .checkpoint import Checkpoints, Stateful
from .config import TrainConfig
from .devices import free_memory, is_out_of_memory, out_of_memory
from .evaluation import Evaluator
from .optimizer import (
    SHARPNESS_AWARE,
    ParameterGroup,
    average_gradients,
    clip_gradients,
    make_optimizer,
    make_schedule,
)
from .progress import Progress, SilentProgress
from .ranks import Ranks
from .run_log import RunLog
from .stopping import Criterion, FixedSteps, StoppingRule

SKIPPED_STEPS_LIMIT = 20
"""Consecutive fp16 steps that may overflow while the loss scale adapts."""


@dataclass
class TrainResult:
    """What a run did; the trained weights themselves are in the groups' parameters."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    stopped_by: Literal["steps", "rule", "cancelled", "nan"] = "steps"
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """Steps done and the loss on the evaluation batch, where the stopping rule asks for it."""
    criterion: Criterion = field(default_factory=Criterion)
    """What the stopping rule has decided by."""
    explanation: str = ""
    """What the stopping rule has to say: why it ended the run, or why it did not."""
    best_step: int | None = None
    """Step whose weights were restored, when the best ones were asked for."""
    steps_per_second: float = 0.0
    """Since the run was started or resumed, without caching, previews and saving."""
    evaluation_share: float = 0.0
    """Part of that time spent on evaluations."""
    peak_memory_bytes: int = 0
    """Largest memory of the device, or of the process where the device is the CPU."""

    @property
    def summary(self) -> str:
        """One line for people."""
        reasons = {
            "steps": "all steps done",
            "rule": self.explanation or "the stopping rule was met",
            "cancelled": "cancelled",
            "nan": "the loss was no longer a number; the last good weights were kept",
        }
        if self.explanation:
            reasons["steps"] += f"; {self.explanation}"
        kept = "" if self.best_step is None else f", best weights from step {self.best_step}"
        share = f", {self.evaluation_share:.0%} of the time for evaluations" if self.evaluation_share else ""
        return (
            f"{self.steps} steps ({reasons[self.stopped_by]}{kept}), {self.steps_per_second:.2f} steps/s{share}, "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        )


def train_loop(
    config: TrainConfig,
    groups: Sequence[ParameterGroup],
    step: Callable[[], Tensor],
    *,
    device: torch.device,
    state: Mapping[str, Stateful] | None = None,
    clip_also: Sequence[Tensor] = (),
    clip_only: Callable[[], Sequence[Tensor] | None] | None = None,
    after_step: Callable[[], None] | None = None,
    stopping: StoppingRule | None = None,
    evaluation: Evaluator | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    run_folder: Path | None = None,
    fingerprint: str = "",
    preview: Callable[[int], Image.Image | None] | None = None,
    save: Callable[[TrainResult], None] | None = None,
) -> TrainResult:
    """Train the groups' parameters in place until the steps are done, the rule says stop, or the user does.

    Args:
        groups: what is trained, in float32.
        step: forward pass of the next micro-batch -> its loss, a scalar with gradient. All random draws
            must come from ``state`` objects.
        state: what decides the coming batches (generator, order), saved with every checkpoint.
        clip_also: tensors whose gradients count in the clipping norm although they are not trained.
        clip_only: asked after the backward passes of each step: the tensors that are clipped, by their norm; None is
            all.
        after_step: called after every optimizer step, for instance to retract embeddings.
        evaluation: what the stopping rule asks for: the recipe's objective on a batch, or how alike its pictures are.
        run_folder: where the log, the previews and the training states go; None keeps nothing.
        fingerprint: identity of settings and data; a state with another one is not resumed.
        preview: step number -> picture, or None when the user cancelled meanwhile. Previews stop, and
            training goes on, when memory does not suffice for them.
        save: writes what was learned; called once at the end by the writing process when there is anything to
            write, whether the run was finished, cancelled or failed.

    Raises:
        TrainingError: out of memory, the very first loss is not a number, or the rule needs what is not evaluated.
        FormatError: the log, a preview, a checkpoint or the result could not be written. Where the result
            could not be, the training state is kept, and a run with ``resume`` tries again.
    """
    progress, ranks, state = progress or SilentProgress(), ranks or Ranks(), state or {}
    rule = stopping or FixedSteps()
    if evaluation is None and (rule.evaluation is not None or rule.pictures is not None):
        raise TrainingError("the stopping rule needs evaluations, which this training does not make; use Stop: Fixed")
    total, stopper = rule.limit(config.steps), rule.start(config.batch_size * config.gradient_accumulation)
    optimizer = make_optimizer(config, groups, ranks)
    schedule = make_schedule(config, optimizer, total)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16" and device.type == "cuda")
    result = TrainResult(criterion=Criterion(stopper.label))
    history = _History(result, stopper.measure)
    best = BestWeights(groups) if config.keep == "best" else None
    drawn = {**state, "stopping": stopper, **({"evaluation": evaluation} if evaluation else {})}
    checkpoints = Checkpoints(
        run_folder,
        config.checkpoint_limit,
        fingerprint,
        groups=groups,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        others={**drawn, "result": history, **({"best": best} if best else {})},
    )
    if config.resume:
        result.steps = checkpoints.load_newest()
        mean_step = float(ranks.mean(torch.tensor(float(result.steps), device=device)))
        if ranks.any(mean_step != result.steps):
            raise TrainingError(
                "the processes resume from different steps; give all of them the same output folder, on a shared disk"
            )
    log = RunLog(run_folder if ranks.is_writer else None, result.steps)
    trained = [parameter for group in groups for parameter in group.parameters.values()]
    progress.report(result.steps, total, stopper.explain(total) or "training")
    seconds, evaluating, done, skipped, note, standing = 0.0, 0.0, 0, 0, "", ""
    measured: dict[str, float] = {}
    finished = ranks.any(stopper.stopped)
    failure: PersonalizeError | None = None
    before: dict[str, dict] = {}
    try:
        while not finished:
            wanted = evaluation is not None and stopper.wants_evaluation(result.steps)
            if result.steps >= total and not (wanted and stopper.at_once):
                break
            started = time.perf_counter()
            before = {name: other.state_dict() for name, other in drawn.items()}
            if wanted:
                if stopper.at_once:  # sampling takes long
                    progress.report(result.steps, total, f"measuring {stopper.label or 'the loss'}")
                values = evaluation.run(lambda: ranks.any(progress.cancelled()))
                if values is None:
                    result.stopped_by = "cancelled"
                    break
                found = stopper.evaluated(result.steps, values[""])
                standing = "".join(f" · {name} {value:.3f}" for name, value in found.items())
                measured = {f"{evaluation.measure}_{name}".rstrip("_"): value for name, value in values.items()} | found
                measured = {name: value for name, value in measured.items() if math.isfinite(value)}
                if best is not None:
                    best.offer(result.steps, -values[""] if evaluation.higher_is_better else values[""])
                took, started = time.perf_counter() - started, time.perf_counter()
                evaluating, seconds = evaluating + took, seconds + took  # also when the step does not come to its end
                finished = stopper.at_once and ranks.any(stopper.stopped)
                if finished or result.steps >= total:
                    before = {}
                    log.write(result.steps, measured)
                    history.evaluated(result.steps, measured)
                    break
            loss = _accumulate(config, step, scaler, progress, ranks)
            if loss is not None and config.optimizer in SHARPNESS_AWARE:
                if ranks.count > 1:
                    average_gradients(trained, ranks)
                with worst_point(trained, config.sam_rho, adaptive=config.optimizer == "adaptive_sam"):
                    optimizer.zero_grad(set_to_none=True)
                    for name, other in state.items():  # the same batch again
                        other.load_state_dict(before[name])
                    cancelled = _accumulate(config, step, scaler, progress, ranks) is None
                loss = None if cancelled else loss
            if loss is None:
                result.stopped_by = "cancelled"
                break
            norm = _synchronize_and_clip(config, trained, clip_also, clip_only, optimizer, scaler, ranks)
            if not math.isfinite(loss) or not (norm.isfinite() or scaler.is_enabled()):
                result.stopped_by = "nan"
                break
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            for tensor in clip_also:
                tensor.grad = None
            if not norm.isfinite():  # the scaler took no step and lowered its scale instead
                skipped += 1
                if skipped > SKIPPED_STEPS_LIMIT:
                    result.stopped_by = "nan"
                    break
                continue
            skipped = 0
            rate = schedule.get_last_lr()[0]
            schedule.step()
            if after_step is not None:
                after_step()
            result.steps, before = result.steps + 1, {}
            if done == 0 and not config.resume and ranks.is_writer:
                checkpoints.clear()
            result.losses.append(loss)
            seconds, done = seconds + time.perf_counter() - started, done + 1
            log.write(result.steps, {"loss": loss, "lr": rate, **measured})
            history.evaluated(result.steps - 1, measured)
            measured = {}
            if best is not None and evaluation is None:
                best.smoothed(result.steps, result.losses)
            finished = ranks.any(stopper.should_stop(result.steps, loss))
            picture = None
            if preview and config.preview_every and result.steps % config.preview_every == 0 and ranks.is_writer:
                try:
                    picture = preview(result.steps)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    preview, note = None, " · no more previews: not enough memory"
                    free_memory(device)
                if picture is not None:
                    log.save_preview(result.steps, picture)
            message = f"loss {loss:.4f} · lr {rate:.1e} · {done / seconds:.2f} steps/s{standing}{note}"
            progress.report(result.steps, total, message, picture)
            if config.checkpoint_every and result.steps % config.checkpoint_every == 0 and ranks.is_writer:
                checkpoints.save(result.steps)
        if finished and result.stopped_by == "steps":
            result.stopped_by = "rule"
    except PersonalizeError as error:
        failure = error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = out_of_memory(config, f"at step {result.steps + 1}").with_traceback(None)
    finally:
        log.close()
    # Draws of an unfinished step are taken back, so that a resume repeats them.
    for name, earlier in before.items():
        drawn[name].load_state_dict(earlier)
    optimizer.zero_grad(set_to_none=True)
    if result.stopped_by == "nan" and not result.steps:
        raise TrainingError(
            "the first loss is not a number; use fp32 or bf16, or check the pictures and the checkpoint"
        )
    result.steps_per_second = done / seconds if done else 0.0
    result.evaluation_share = evaluating / seconds if done else 0.0
    result.explanation = stopper.explain(total)
    result.criterion.threshold = stopper.threshold
    result.criterion.stopped_at = result.steps if result.stopped_by == "rule" else None
    result.peak_memory_bytes = peak_memory(device)
    if ranks.is_writer and result.steps:
        interrupted = failure is not None or result.stopped_by == "cancelled"
        result.best_step = _keep(result, checkpoints, best, save, failure, interrupted)
    if failure is not None:
        raise failure
    return result


def _keep(
    result: TrainResult,
    checkpoints: Checkpoints,
    best: BestWeights | None,
    save: Callable[[TrainResult], None] | None,
    failure: PersonalizeError | None,
    interrupted: bool,
) -> int | None:
    """Write what a run leaves, so that neither a failure nor a full disk loses it; the step of the best weights.

    The state is written when the run is to be continued: after a cancel or failure, or when the result itself
    could not be saved. Raises the failure, which then says what was kept.
    """
    state_error = _save_state(checkpoints, result.steps) if interrupted else None
    best_step = best.swap() if best is not None else None
    try:
        if save is not None:
            save(result)
    except PersonalizeError as error:
        if not interrupted:
            if best is not None:
                best.swap()  # the state is that of the last step
            state_error = _save_state(checkpoints, result.steps)
        kept = "" if state_error else f"; the training state was kept, resume continues from step {result.steps}"
        raise type(error)(f"{error}{kept}") from error
    if failure is not None:
        raise type(failure)(f"{failure} (what was learned in {result.steps} steps was saved)") from failure
    if state_error is not None:
        raise state_error
    return best_step


def _save_state(checkpoints: Checkpoints, step: int) -> PersonalizeError | None:
    """Write the state; why that failed, rather than hide the failure that made it necessary."""
    try:
        checkpoints.save(step)
    except PersonalizeError as error:
        return error
    return None


def _accumulate(config, step, scaler, progress, ranks) -> float | None:
    """Backward passes of one optimizer step; the mean loss, or None when the user cancelled."""
    total = 0.0
    for _ in range(config.gradient_accumulation):
        if ranks.any(progress.cancelled()):
            return None
        loss = step() / config.gradient_accumulation
        scaler.scale(loss).backward()
        total += float(ranks.mean(loss.detach()))
    return total


def _synchronize_and_clip(config, trained, clip_also, clip_only, optimizer, scaler, ranks) -> Tensor:
    """Average the gradients over the ranks, undo the loss scale and clip; all gradients' norm before clipping."""
    if ranks.count > 1:
        average_gradients([*trained, *clip_also], ranks)
    scaler.unscale_(optimizer)
    if scaler.is_enabled():
        for tensor in clip_also:
            if tensor.grad is not None:
                tensor.grad.div_(scaler.get_scale())
    some = clip_only() if clip_only is not None else None
    if some is None:
        return clip_gradients([*trained, *clip_also], config.max_grad_norm)
    norm = clip_gradients([*trained, *clip_also], 0.0)
    clip_gradients(some, config.max_grad_norm)
    return norm


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's largest allocation, or on the CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    # Linux counts kibibytes here, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _History:
    """The losses and evaluations so far as part of a training state."""

    def __init__(self, result: TrainResult, measure: str) -> None:
        """Args: measure: name of what the stopping rule decides by."""
        self._losses = result.losses
        self._evaluations = {"evaluation": result.evaluations, measure: result.criterion.values}

    def evaluated(self, steps: int, measured: Mapping[str, float]) -> None:
        """Remember what was measured of the weights after ``steps`` steps."""
        for name, values in self._evaluations.items():
            if name in measured:
                values.append((steps, measured[name]))

    def state_dict(self) -> dict:
        first, second = self._evaluations.values()
        return {"losses": self._losses, "evaluations": first, "criterion": second}

    def load_state_dict(self, state: dict) -> None:
        self._losses[:] = state["losses"]
        for name, values in zip(("evaluations", "criterion"), self._evaluations.values(), strict=True):
            values[:] = [(steps, value) for steps, value in state.get(name, ())]
