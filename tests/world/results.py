"""Measure what personalization does to the small world's models, and write results.md: python tests/world/results.py

Subjects and styles that the base models never saw are taught with each method and with several seeds, and the scorer
reads what is drawn afterwards. The papers' claims are compared with the numbers here, in code. It takes about a
quarter of an hour on two quiet cores; `--quick` takes one subject, one seed and few steps, to see that all runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

import experiments  # noqa: E402 - lies in the folder that was just added
import weights  # noqa: E402
from experiments import (  # noqa: E402
    BASE_DESCRIPTION,
    BASE_WORD,
    MAIN_BASE,
    OTHER_BASE,
    REWARD_SCALE,
    Extent,
    Files,
    Record,
    chosen,
    rewarded_label,
)
from methods import BETA, METHODS, SAMPLING_STEPS, SETTINGS, TEXT_SCALE  # noqa: E402
from PIL import Image  # noqa: E402
from prompts import REPORTING, TUNING  # noqa: E402
from scores import Curve, Spread, common_levels, gain_at_equal_subject, rises, verdict  # noqa: E402
from sheet import Row, draw_sheet  # noqa: E402

MAX_SHEET_BYTES = 150_000
COLUMNS = {
    "subject": "subject",
    "parts": "parts",
    "background": "background",
    "second": "second object",
    "style": "style",
    "prompt": "prompt fidelity",
}
"""Of the tables: name in Scores -> heading."""


REPRODUCES = verdict([True])
UNEXPLAINED = "No explanation was found"
EQUAL_FIDELITY = "At equal subject fidelity dco keeps more of the prompt than dreambooth_lora"
MERGED_BETTER = "They do so more often than those of dreambooth_lora"
EXPLANATIONS = {
    EQUAL_FIDELITY: "The plain loss costs this model little of the prompt to begin with: some hundredths, about as "
    "much as one seed differs from another. The paper's models are trained longer on fewer pictures",
    MERGED_BETTER: "dco holds the style's LoRA close to the base model, too: the style is missing more often, while "
    "the subject keeps its looks where the other method's dissolves. Reward guidance, by which the paper merges, makes "
    "up for it",
}
"""The best that was found for claims that did not reproduce; said beside the verdict for as long as it is so."""


@dataclass(frozen=True)
class Claim:
    """Something that a paper says, and whether it is so here."""

    text: str
    verdict: str
    numbers: str

    def __str__(self) -> str:
        explanation = "" if self.verdict == REPRODUCES else f" {EXPLANATIONS.get(self.text, UNEXPLAINED)}."
        return f"{self.text}: **{self.verdict}** ({self.numbers}).{explanation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one subject, one seed, few steps")
    parser.add_argument("--tuning", action="store_true", help="draw the tuning prompts instead of the reporting ones")
    parser.add_argument("--weights", type=Path, help="folder of weights to measure instead of the committed ones")
    parser.add_argument("--processes", type=int, default=2, help="each has one computing thread")
    parser.add_argument("--out", type=Path, help="folder of results.md; tests/world, or its work folder for a trial")
    arguments = parser.parse_args()
    extent = experiments.QUICK if arguments.quick else experiments.FULL
    extent = replace(extent, prompts=TUNING if arguments.tuning else REPORTING)
    trial = arguments.quick or arguments.tuning
    out = arguments.out or (HERE / "work" / "results" if trial else HERE)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        files = Files.of_folder(arguments.weights, Path(work)) if arguments.weights else Files.committed(Path(work))
        records = experiments.run(extent, files, arguments.processes)
    minutes = (time.monotonic() - started) / 60
    (out / "results").mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets(records, extent).items():
        save_sheet(sheet, out / "results" / f"{name}.jpg")
    text = report(records, extent, minutes, trial=trial)
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)


# Claims


def claims(records: Sequence[Record], extent: Extent) -> list[Claim]:
    """Everything that is compared with a paper, in the order of the report."""
    return [*equal_fidelity(records, extent), slider(records, extent), *merged(records, extent)]


def equal_fidelity(records: Sequence[Record], extent: Extent) -> list[Claim]:
    """More prompt fidelity than DreamBooth-LoRA at equal subject fidelity (arXiv 2402.12004, section 5)."""
    found = []
    for label, curve_of in {
        "dco": lambda seed: training_curve(records, extent, "dco", seed),
        "dco with reward guidance": lambda seed: reward_curve(records, extent, seed),
    }.items():
        pairs = [(curve_of(seed), training_curve(records, extent, "dreambooth_lora", seed)) for seed in extent.seeds]
        gains = [gain_at_equal_subject(*pair) for pair in pairs]
        levels = [level for pair in pairs for level in common_levels(*pair)]
        found.append(
            Claim(
                EQUAL_FIDELITY.replace("dco", label),
                verdict([gain > 0 for gain in gains]),
                f"prompt fidelity {signed(Spread.of(gains))} at subject fidelities "
                f"{min(levels):.2f} to {max(levels):.2f}",
            )
        )
    return found


def slider(records: Sequence[Record], extent: Extent) -> Claim:
    """Subject fidelity rises with the scale of reward guidance (the same paper, section 4.3)."""
    ways = [[subject for subject, _ in reward_curve(records, extent, seed)] for seed in extent.seeds]
    means = " → ".join(f"{statistics.fmean(way):.2f}" for way in zip(*ways))
    scales = ", ".join(f"{scale:g}" for scale in extent.scales)
    return Claim(
        "Subject fidelity rises monotonically with the scale of reward guidance",
        verdict([rises(way) for way in ways]),
        f"{means} at scales {scales}",
    )


def merged(records: Sequence[Record], extent: Extent) -> list[Claim]:
    """Subject and style LoRAs work together untrained, and DCO's better than DreamBooth's (the same, section 5)."""

    def both(method: str) -> list[float]:
        return by_seed(chosen(records, base=MAIN_BASE, method=method), extent, lambda record: record.scores.both)

    alone, plain, dco = (
        both(name) for name in ("dco, subject's LoRA alone", "dreambooth_lora, both LoRAs", "dco, both LoRAs")
    )
    numbers = f"subject and style both there in {Spread.of(dco)} of the pictures"
    return [
        Claim(
            "Two LoRAs of dco draw the subject in the style without further training",
            verdict([after > before for before, after in zip(alone, dco)]),
            f"{numbers}, {Spread.of(alone)} without the style's",
        ),
        Claim(
            MERGED_BETTER,
            verdict([ours > theirs for theirs, ours in zip(plain, dco)]),
            f"{numbers}, {Spread.of(plain)} with those of dreambooth_lora",
        ),
    ]


def training_curve(records: Sequence[Record], extent: Extent, method: str, seed: int) -> Curve:
    """Subject and prompt fidelity from the untaught model to the whole training, means over the subjects."""
    steps = [chosen(records, base=MAIN_BASE, seed=seed, method=BASE_WORD)]
    taught = chosen(records, base=MAIN_BASE, seed=seed, method=method)
    steps += [chosen(taught, steps=length) for length in extent.lengths]
    return [fidelities(some) for some in steps]


def reward_curve(records: Sequence[Record], extent: Extent, seed: int) -> Curve:
    """The same from the smallest scale of reward guidance to the largest."""
    mine = chosen(records, base=MAIN_BASE, seed=seed, style="")
    return [fidelities(chosen(mine, method=rewarded_label(scale))) for scale in extent.scales]


def fidelities(records: Sequence[Record]) -> tuple[float, float]:
    return (
        statistics.fmean(record.scores.subject for record in records),
        statistics.fmean(record.scores.prompt for record in records),
    )


def by_seed(records: Iterable[Record], extent: Extent, value: Callable[[Record], float]) -> list[float]:
    """The value's mean over subjects and styles for each seed."""
    records = list(records)
    return [statistics.fmean(value(record) for record in chosen(records, seed=seed)) for seed in extent.seeds]


# Report


def report(records: Sequence[Record], extent: Extent, minutes: float, *, trial: bool = False) -> str:
    """The whole of results.md."""
    shown = [str(claim) for claim in claims(records, extent)]
    equal, (slide, *merges) = shown[:2], shown[2:]
    run = weights.Run.now(seed=extent.seeds[0], steps=extent.lengths[-1], data="")
    lines = [
        "# What personalization does to the small world's models",
        "",
        f"Written by `python tests/world/results.py` at commit {run.commit} on {datetime.now(UTC):%Y-%m-%d} in "
        f"{minutes:.0f} minutes. Machine: {run.machine}.",
        "",
        *(["**A trial: too few steps, or prompts that settings are chosen by.**", ""] if trial else []),
        f"Each number is the mean over {listed(extent.subjects)} ± its standard deviation over the training seeds "
        f"{listed(map(str, extent.seeds))}; {extent.drawn} pictures of each of {len(extent.prompts)} prompts, less "
        "those on whose background a subject could not be seen. *subject*: mean probability, by the scorer, that the "
        "character is in the picture. *parts*: share of its parts that are right. *background*, *second object* (shape "
        "and colour, on its side) and *style*: share right of those asked for; *prompt fidelity* is the mean of the "
        "three. A claim reproduces when it holds with every seed.",
        "",
        f"All methods: {settings_in_words(extent)}.",
        "",
        "## Claims",
        "",
        *(f"- {claim}" for claim in shown),
        "",
        "## Subject and prompt fidelity",
        "",
        *fidelity_table(records, extent, MAIN_BASE),
        "",
        "![Pictures by method](results/fidelity.jpg)",
        "",
        f"The same on {OTHER_BASE}, for {extent.subjects[0]} alone:",
        "",
        *fidelity_table(records, extent, OTHER_BASE),
        "",
        "## Prompt fidelity at equal subject fidelity",
        "",
        "Pictures after every length of training, with plain guidance. Between two lengths, and between two scales of "
        "reward guidance, fidelities are interpolated; the difference is the mean over the upper half of the subject "
        "fidelities that both reach.",
        "",
        *(line for claim in equal for line in (claim, "")),
        *length_table(records, extent),
        "",
        "![Pictures by length of training](results/lengths.jpg)",
        "",
        "## The slider of reward guidance",
        "",
        slide,
        "",
        "What the highest scales cost first is the style that the prompt asks for.",
        "",
        *scale_table(records, extent),
        "",
        "![Pictures by reward scale](results/slider.jpg)",
        "",
        "## A subject in a style, both taught apart",
        "",
        f"Styles: {listed(extent.styles)}. *both*: share of pictures in the style in which the subject is more likely "
        "than not. Only prompts of the subject alone; prompt fidelity is that of background and style.",
        "",
        *(line for claim in merges for line in (claim, "")),
        *merge_table(records, extent),
        "",
        "![Subjects in taught styles](results/merge.jpg)",
    ]
    return "\n".join(lines) + "\n"


def settings_in_words(extent: Extent) -> str:
    names = ("batch_size", "learning_rate", "text_learning_rate", "rank", "resolution")
    training = ", ".join(f"{name} {SETTINGS[name]:g}" for name in names)
    return (
        f"{extent.lengths[-1]} steps, {training}; dco's beta is {BETA:g}, dreambooth_lora is the same trainer with the "
        f"plain loss. Sampling: Euler, {SAMPLING_STEPS} steps, text scale {TEXT_SCALE:g}"
    )


def fidelity_table(records: Sequence[Record], extent: Extent, base: str) -> list[str]:
    """The whole training by method."""
    last = extent.lengths[-1]
    rows = {BASE_WORD: 0, BASE_DESCRIPTION: 0, **dict.fromkeys(METHODS, last), rewarded_label(REWARD_SCALE): last}
    lines = table_head(["method", *COLUMNS.values(), "training"])
    for method, steps in rows.items():
        some = chosen(records, base=base, method=method, steps=steps, style="")
        seconds = statistics.fmean(record.seconds for record in some)
        lines.append(table_row(method, some, extent, COLUMNS, f"{seconds:.0f} s" if seconds else "–"))
    return lines


def length_table(records: Sequence[Record], extent: Extent) -> list[str]:
    lines = table_head(["method", "steps", *COLUMNS.values()])
    for method in METHODS:
        for steps in extent.lengths:
            some = chosen(records, base=MAIN_BASE, method=method, steps=steps)
            lines.append(table_row(f"{method} | {steps}", some, extent, COLUMNS))
    return lines


def scale_table(records: Sequence[Record], extent: Extent) -> list[str]:
    lines = table_head(["reward scale", *COLUMNS.values()])
    for scale in extent.scales:
        some = chosen(records, base=MAIN_BASE, method=rewarded_label(scale), style="")
        lines.append(table_row(f"{scale:g}", some, extent, COLUMNS))
    return lines


def merge_table(records: Sequence[Record], extent: Extent) -> list[str]:
    columns = {"both": "both", "subject": "subject", "style": "style", "background": "background"}
    columns["prompt"] = COLUMNS["prompt"]
    lines = table_head(["drawn with", *columns.values()])
    mine = [record for record in records if record.style]
    for method in dict.fromkeys(record.method for record in mine):
        lines.append(table_row(method, chosen(mine, method=method), extent, columns))
    return lines


def table_head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"| --- |{' --- |' * (len(names) - 1)}"]


def table_row(name: str, records: Sequence[Record], extent: Extent, columns: Iterable[str], *more: str) -> str:
    cells = [name]
    for column in columns:
        if any(getattr(record.scores, column) is None for record in records):
            cells.append("–")
        else:
            cells.append(str(Spread.of(by_seed(records, extent, lambda record: getattr(record.scores, column)))))  # noqa: B023
    return f"| {' | '.join([*cells, *more])} |"


def listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def signed(spread: Spread) -> str:
    return f"{spread.mean:+.2f} ± {spread.deviation:.2f}"


# Pictures


def sheets(records: Sequence[Record], extent: Extent) -> dict[str, Image.Image]:
    """A labelled grid for each section, of the first subject and seed."""
    subject = extent.subjects[0]
    mine = chosen(records, base=MAIN_BASE, subject=subject, seed=extent.seeds[0])
    plain, merges = chosen(mine, style=""), [record for record in mine if record.style]
    last = extent.lengths[-1]
    shown = [BASE_WORD, BASE_DESCRIPTION, *METHODS, rewarded_label(REWARD_SCALE)]
    by_method = [next(r for r in plain if r.method == method and r.steps in (0, last)) for method in shown]
    pair = _first(by_method[0], " and ")
    grown = [chosen(plain, method=method, steps=steps)[0] for method in METHODS for steps in extent.lengths]
    scaled = [chosen(plain, method=rewarded_label(scale))[0] for scale in extent.scales]
    count = len(extent.lengths)
    lengths = [f"{steps} steps" for steps in extent.lengths]
    return {
        "fidelity": draw_sheet(
            f"The character {subject}, drawn after it was taught",
            f"Each column a prompt and a seed of the noise, each row what draws. After the training <{subject}> stands "
            "in the place of its class word.",
            _rows({record.method: record for record in by_method}, _examples(by_method[0])),
        ),
        "lengths": draw_sheet(
            "While the training goes on",
            f"“{grown[0].prompts[pair]}” and “{grown[0].prompts[0]}”, plain guidance.",
            [
                Row(method, lengths if not number else [], [_picture(r, place) for r in grown[start : start + count]])
                for number, (method, start, place) in enumerate(
                    (method, start, place)
                    for method, start in zip(METHODS, range(0, len(grown), count))
                    for place in (pair, 0)
                )
            ],
        ),
        "slider": draw_sheet(
            "The slider of reward guidance",
            f"The same noise at rising reward scales, after {last} steps of dco.",
            [
                Row(
                    scaled[0].prompts[place],
                    [f"reward scale {scale:g}" for scale in extent.scales] if not number else [],
                    [_picture(record, place) for record in scaled],
                )
                for number, place in enumerate(_examples(scaled[0])[:4])
            ],
        ),
        "merge": draw_sheet(
            "A subject in a style, both taught apart",
            "Each row a style and what draws. No training saw the two together.",
            _rows({f"{record.style}: {record.method}": record for record in merges}, range(5)),
        ),
    }


def _examples(record: Record) -> list[int]:
    """Prompts worth a column: two of the subject alone, two with a second object, two in a style."""
    plain = [i for i, words in enumerate(record.prompts) if " and " not in words and not words.endswith("style")]
    pairs = [i for i, words in enumerate(record.prompts) if " and a" in words]
    styled = [i for i, words in enumerate(record.prompts) if words.endswith("style")]
    return [*plain[-2:], *pairs[:2], *styled[:2]]


def _first(record: Record, word: str) -> int:
    return next(place for place, words in enumerate(record.prompts) if word in words)


def _rows(records: dict[str, Record], places: Sequence[int]) -> list[Row]:
    """A row for each record, the prompts written above the first one, without a style that differs by row."""
    rows = []
    for text, record in records.items():
        places = [place for place in places if place < len(record.prompts)]
        labels = [record.prompts[place].removesuffix(f" in {record.style} style") for place in places]
        rows.append(Row(text, labels if not rows else [], [_picture(record, place) for place in places]))
    return rows


def _picture(record: Record, place: int) -> Image.Image:
    return Image.fromarray(record.pictures[place])


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """As a JPEG of at most MAX_SHEET_BYTES, as good as that allows."""
    for quality in range(90, 20, -5):
        buffer = BytesIO()
        sheet.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MAX_SHEET_BYTES:
            break
    path.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    main()
