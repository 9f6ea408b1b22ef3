"""What stopping rules save and cost on the small world: `python tests/benchmarks/dvar.py` writes DVAR.md beside this.

Three characters are taught with each of the three methods that DVAR was made for. It takes about half an hour of one
quiet core; what has been done is kept, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from dvar_trainings import CHARACTERS, CHECK, METHODS, SETTINGS, TESTS, Ended, Measured, Workshop, weights
from safetensors.torch import save_file

from comfyui_personalize.models.dvar import EvaluationSettings, Preset
from comfyui_personalize.trainers.stopping import DVAR

HERE = Path(__file__).resolve().parent
SERIES = HERE / "dvar_losses.safetensors"
"""The watched losses, for tests of how often to evaluate."""


def rows(numbers: Preset, every: int, found: Sequence[Measured]) -> list[str]:
    """A row per rule: medians over the characters, with their range, of ratios to the training of the full budget."""
    full = numbers.full_steps

    def replayed(one: Measured) -> Ended:
        """DVAR with an evaluation at every step, as the authors', on the watched losses."""
        state = DVAR(window=numbers.window, eps=numbers.eps, every=1).start(SETTINGS["batch_size"])
        for steps, loss in enumerate(one.losses[:full]):
            state.evaluated(steps, loss)
            if state.stopped:
                return Ended(steps + 1, True, one.watching)
        return Ended(full, False, one.watching)

    rules: dict[str, Callable[[Measured], Ended]] = {
        "full budget": lambda one: Ended(full, False, 0.0),
        "fixed, short": lambda one: Ended(numbers.short_steps, False, 0.0),
        "DVAR, every step": replayed,
        f"DVAR, every {every} steps" if every > 1 else "DVAR, as it chooses": lambda one: one.dvar,
        "CLIP plateau": lambda one: one.clip,
    }
    lines = []
    for name, end_of in rules.items():
        ends = [end_of(one) for one in found]
        columns = [
            spread([end.steps for end in ends], "{:.0f}"),
            spread([end.steps / full for end in ends]),
            spread([end.steps / (1 - end.share) / full for end in ends]),
            spread([end.share for end in ends], "{:.0%}"),
            spread([one.losses[end.steps] / one.losses[full] for one, end in zip(found, ends)], "{:.3f}"),
            spread([fall(one, end.steps) for one, end in zip(found, ends)], "{:.0%}"),
            f"{sum(end.stopped for end in ends)} of {len(ends)}" if "fixed" not in name and "full" not in name else "–",
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


def fall(one: Measured, steps: int) -> float:
    """How much of the fall of the loss over the full budget there has been after so many steps."""
    return (one.losses[0] - one.losses[steps]) / (one.losses[0] - one.losses[-1])


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The median, and in brackets the smallest and largest where they read differently."""
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}–{most})"


def page(workshop: Workshop, measured: dict[str, list[Measured]], characters: Sequence[str]) -> str:
    measured_on = f"of one training of the character {characters[0]}"
    if len(characters) > 1:
        measured_on = f"the median over the characters {', '.join(characters)}, with its range"
    lines = [
        "# Stopping rules",
        "",
        f"Written by `python tests/benchmarks/dvar.py`, {date.today().isoformat()}, {weights.machine()}. Each number "
        f"is {measured_on}; see tests/world.",
        "",
        f"The authors' budgets, windows and distances between checks, divided by {workshop.shorter}: the small "
        "model learns faster than theirs; Textual Inversion's full budget is a quarter of that. Time is counted in"
        " plain training steps, evaluations and sampled pictures included, and compared with the full budget's. "
        "*Loss* is the evaluation loss of the last weights, against those of the full budget; *fall* is how much "
        "of the full budget's fall of that loss there has been.",
        "",
        f"Pictures {SETTINGS['batch_size']} per step, of which evaluations have {EvaluationSettings().rows}; "
        f"{CHECK['count']} pictures of {CHECK['steps']} steps per check of the CLIP plateau, patience and eps as the "
        "authors', who take 50 to 200 steps for each, so that their checks cost more. No class pictures.",
        "",
        "How to read it: DVAR ends a training when its loss falls slowly against how it fell before, not when it no "
        "longer falls, and does so after a window at the earliest; more steps still lower the loss on the training "
        "pictures. A fixed budget costs no evaluations, but somebody has to know it. The CLIP plateau needs its "
        "patience and two more checks, so that small budgets leave it no room, and each check costs as much as several "
        "steps.",
    ]
    for method, found in measured.items():
        numbers = workshop.preset(method)
        rule = DVAR(window=numbers.window, eps=numbers.eps)
        lines += [
            "",
            f"## {method}",
            "",
            f"Full budget {numbers.full_steps} steps, short one {numbers.short_steps}; DVAR's window {numbers.window}, "
            f"eps {numbers.eps}; learning rate {METHODS[method][2]:g}.",
            "",
            "| rule | steps | of the steps | of the time | of it evaluating | loss | fall | stopped by it |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows(numbers, rule.frequency(SETTINGS["batch_size"]), found),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=TESTS / "world" / "work" / "dvar", help="keeps what has been done")
    parser.add_argument("--quick", action="store_true", help="few steps, nothing written: only shows that it runs")
    parser.add_argument("--characters", nargs="+", default=CHARACTERS, help="some of the small world's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            workshop = Workshop(Path(folder), shorter=50, inversion_steps=12, check={"count": 1, "steps": 1})
            print(page(workshop, run(workshop, CHARACTERS[:1]), CHARACTERS[:1]))
        return
    workshop = Workshop(arguments.work)
    workshop.work.mkdir(parents=True, exist_ok=True)
    measured = run(workshop, arguments.characters)
    text = page(workshop, measured, arguments.characters)
    print(text)
    (HERE / "DVAR.md").write_text(text, encoding="utf-8")
    save_file(
        {
            f"{method}, {character}": torch.tensor(one.losses)
            for method, found in measured.items()
            for character, one in zip(arguments.characters, found)
        },
        SERIES,
    )


def run(workshop: Workshop, characters: Sequence[str]) -> dict[str, list[Measured]]:
    """Method -> what was measured, in the order of the characters."""
    measured: dict[str, list[Measured]] = {method: [] for method in METHODS}
    for character in characters:
        for method in reversed(METHODS):  # the quickest first
            measured[method].append(workshop.measure(method, character))
    return measured


if __name__ == "__main__":
    main()
