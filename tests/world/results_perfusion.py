"""Measure Perfusion on the small world, and write results_perfusion.md: python tests/world/results_perfusion.py

A character is taught as a concept, as a word by Textual Inversion and as a LoRA by DreamBooth, and drawn, also behind
gates of several biases; then it is drawn beside other things that were taught apart. `--tuning` draws the prompts that
settings are chosen by.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

import torch  # noqa: E402
import weights  # noqa: E402
from concept_experiments import (  # noqa: E402
    ALIKE,
    ALONE,
    BETAS,
    GATE,
    GATED_REMOVAL,
    LOCKED,
    LORA,
    PAIR,
    WORDS,
    Drawn,
    Measured,
    measure,
)
from concept_methods import BETA, INVERSION, PERFUSION, TAU  # noqa: E402
from experiments import BASE_DESCRIPTION, BASE_WORD, MAIN_BASE, Files  # noqa: E402
from methods import SAMPLING_STEPS, STEPS, TEXT_SCALE  # noqa: E402
from PIL import Image  # noqa: E402
from prompts import REPORTING, TUNING  # noqa: E402
from results import listed, save_sheet, table_head  # noqa: E402
from scores import Spread, verdict  # noqa: E402
from sheet import Row, draw_sheet  # noqa: E402

SEEDS = 3
COLUMNS = {
    "subject": "subject",
    "parts": "parts",
    "background": "background",
    "second": "second object",
    "style": "style",
    "prompt": "prompt fidelity",
}
PAIR_COLUMNS = {"looks": "looks", "bleeding": "bleeding", "both": "both right"}
OPEN = GATE.format(BETA)
SHOWN = 5
"""Pictures in a row of a sheet."""
BETTER_THAN_WORDS = "A concept looks more like its character than a word of Textual Inversion does"
AS_GOOD_AS_LORA = "A concept looks as much like its character as a LoRA of DreamBooth does"
SLIDER = "A rising bias of the gate takes the character's looks away"
TOGETHER = "Two concepts taught apart are right in one picture more often than two LoRAs of DreamBooth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true", help="draw the tuning prompts; nothing is written here")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many training seeds")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--work", type=Path, help="folder that keeps what is learned, to go on after an interruption")
    arguments = parser.parse_args()
    started = time.monotonic()
    trial = arguments.tuning or arguments.steps != STEPS or arguments.seeds != SEEDS
    out = HERE / "work" / "results_perfusion" if trial else HERE
    with tempfile.TemporaryDirectory() as work:
        prompts = TUNING if arguments.tuning else REPORTING
        found = measure(Files.committed(arguments.work or Path(work)), range(arguments.seeds), prompts, arguments.steps)
    (out / "results").mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets(found).items():
        save_sheet(sheet, out / "results" / f"{name}.jpg")
    text = report(found, (time.monotonic() - started) / 60, arguments.steps, kept=arguments.work is not None)
    (out / "results_perfusion.md").write_text(text, encoding="utf-8")
    print(text)


# Claims


def claims(found: Measured) -> list[str]:
    """What is compared with the paper (arXiv 2305.01644, section 5), each with the numbers of every seed."""

    def beside(column: str, theirs: str, *things: str) -> tuple[list[tuple[float, float]], str]:
        both = [by_seed(found, method, column, *things) for method in (OPEN, theirs)]
        return list(zip(*both)), " against ".join(str(Spread.of(values)) for values in both)

    words, of_words = beside("parts", WORDS, ALONE)
    loras, of_loras = beside("subject", LORA, ALONE)
    ways = list(zip(*(by_seed(found, GATE.format(beta), "parts", ALONE) for beta in BETAS)))
    falls = [all(later <= earlier for earlier, later in zip(way, way[1:])) and way[-1] < way[0] for way in ways]
    both, of_both = beside("both", LORA, *PAIR)
    return [
        claim(BETTER_THAN_WORDS, [a > b for a, b in words], f"parts {of_words}"),
        claim(AS_GOOD_AS_LORA, [a >= b for a, b in loras], f"subject {of_loras}"),
        claim(SLIDER, falls, "parts " + " → ".join(f"{statistics.fmean(way):.2f}" for way in zip(*ways))),
        claim(TOGETHER, [a > b for a, b in both], f"both right {of_both}"),
    ]


def claim(text: str, holds: Sequence[bool], numbers: str) -> str:
    return f"- {text}: **{verdict(holds)}** ({numbers})."


def by_seed(found: Measured, method: str, column: str, *things: str) -> list[float]:
    some = found.of(method, *things)
    return [next(getattr(one.scores, column) for one in some if one.seed == seed) for seed in found.seeds]


# Report


def report(found: Measured, minutes: float, steps: int, *, kept: bool = False) -> str:
    """The whole of results_perfusion.md."""
    run = weights.Run.now(seed=found.seeds[0], steps=steps, data="")
    drawn = [BASE_WORD, BASE_DESCRIPTION, WORDS, LORA, OPEN, LOCKED]
    lines = [
        "# What Perfusion does on the small world",
        "",
        f"Written by `python tests/world/results_perfusion.py` at commit {run.commit} on {datetime.now(UTC):%Y-%m-%d} "
        f"in {minutes:.0f} minutes{', with what an earlier run had taught' if kept else ''}. Machine: {run.machine}.",
        "",
        f"Model {MAIN_BASE}. Training seeds: {listed(map(str, found.seeds))}; means over them ± standard deviation. "
        "*subject*, *parts* and the columns of the prompt are those of [results.md](results.md). A claim reproduces "
        "when it holds with every seed.",
        "",
        f"All trainings: {steps} steps of {PERFUSION['batch_size']} pictures. Perfusion: learning rate "
        f"{PERFUSION['learning_rate']:g}, of the word {PERFUSION['embedding_learning_rate']:g}, decay of the target "
        f"input {PERFUSION['ema_decay']:g}, the pictures' own captions, gates of bias {BETA:g} and temperature {TAU:g} "
        "while drawing. The authors take 400 steps of 4 × 4 pictures, 0.03, 0.006, 0.99 and nine templates; with their "
        "rate and decay of the word the encodings of two words hardly leave their superclass here (resemblance 0.5 to "
        "0.8), so that each gate opens for both. "
        f"Textual Inversion: learning rate {INVERSION['learning_rate']:g}. Sampling: Euler, {SAMPLING_STEPS} steps, "
        f"text scale {TEXT_SCALE:g}.",
        "",
        "## Claims",
        "",
        *claims(found),
        "",
        "A concept of this model is a word and 704 numbers in 7 layers. It gets about as far as the description in "
        "ordinary words, which does not say that one horn is green; the LoRA goes beyond it. Beyond a resemblance of 1 "
        "the gate closes: the word's own direction is taken away and nothing comes in its place.",
        "",
        f"## One character, {ALONE}",
        "",
        *table(found, drawn, COLUMNS, ALONE),
        "",
        "![One character](results/perfusion_one.jpg)",
        "",
        "## The gate's bias",
        "",
        *table(found, [method.format(beta) for method in (GATE, GATED_REMOVAL) for beta in BETAS], COLUMNS, ALONE),
        "",
        "## Two things in one picture",
        "",
        "Taught apart, each in its own training. *looks*: what is right of each on its side. *bleeding*: things in the "
        "other's colour. *both right*: pictures with both kinds of things in their own colours. The base model was "
        "never shown two creatures at once.",
    ]
    for pair, methods in (
        (PAIR, [one for one in drawn if one != WORDS]),
        (ALIKE, [BASE_WORD, BASE_DESCRIPTION, OPEN, LOCKED]),
    ):
        lines += ["", f"### {listed(pair)}", "", *table(found, methods, PAIR_COLUMNS, *pair)]
        lines += ["", f"![{listed(pair)}](results/perfusion_{pair[1]}.jpg)"]
    lines += [
        "",
        "How alike a word's encoding is to each target input, 1 for the target input itself, in a prompt with "
        "both: each gate opens at its own word and hardly anywhere else, whatever the pair. What is left of "
        "bleeding has two causes besides the gates. The text encoder reads the second word behind the first, and "
        "all words after both. And keys are locked to the superclass: zib and mok have the same key in every "
        "layer, to the last bit, so a pixel cannot tell their words apart by it; zib and kro have different ones.",
        "",
        *gate_table(found),
    ]
    return "\n".join(lines) + "\n"


def table(found: Measured, methods: Sequence[str], columns: dict[str, str], *things: str) -> list[str]:
    lines = table_head(["method", *columns.values()])
    for method in methods:
        cells = [str(Spread.of(by_seed(found, method, column, *things))) for column in columns]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return lines


def gate_table(found: Measured) -> list[str]:
    heads = ["first to itself", "first to second", "second to first", "second to itself"]
    lines = table_head(["pair", "seed", *heads, "elsewhere at most", "cosine of the target inputs"])
    for gates in found.gates:
        cells = [*(value for row in gates.alike for value in row), gates.others, gates.cosine]
        numbers = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {listed(gates.things)} | {gates.seed} | {numbers} |")
    return lines


# Pictures


def sheets(found: Measured) -> dict[str, Image.Image]:
    """A labelled grid for one character and one for each pair, of the first seed."""
    seed = found.seeds[0]
    alone = [BASE_WORD, WORDS, LORA, *(GATE.format(beta) for beta in BETAS)]
    told = "Each column a prompt and a seed of the noise, each row what draws."
    drawn = {
        "perfusion_one": draw_sheet(
            f"The character {ALONE} as a concept",
            told,
            rows([first(found.of(method, ALONE), seed) for method in alone], (0, 4, 7, 8, 13)),
        )
    }
    for pair, trained in ((PAIR, [LORA]), (ALIKE, [])):
        shown = [found.of(method, *pair) for method in (BASE_WORD, BASE_DESCRIPTION, *trained, OPEN, LOCKED)]
        drawn[f"perfusion_{pair[1]}"] = draw_sheet(
            f"{listed(pair)} in one picture",
            f"They were taught apart. {told}",
            rows([first(some, seed) for some in shown], range(SHOWN)),
        )
    return drawn


def first(some: Sequence[Drawn], seed: int) -> Drawn:
    return next(one for one in some if one.seed == seed)


def rows(some: Sequence[Drawn], places: Sequence[int]) -> list[Row]:
    found = []
    for one in some:
        shown = [place for place in places if place < len(one.prompts)]
        labels = [one.prompts[place] for place in shown] if not found else []
        found.append(Row(one.method, labels, [to_image(one.pictures[place]) for place in shown]))
    return found


def to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
