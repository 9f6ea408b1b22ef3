"""Train face encoders on the small world, and write results_lookahead.md: python tests/world/results_lookahead.py

Encoders learn from people made up at random; then people whom neither they nor the base model have seen are drawn from
one picture of each, and the small world's identity network says how alike they are. `--quick` takes one seed and few
steps, to see that all runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo"), str(HERE.parent / "host")]

import boot  # noqa: E402 - lies in a folder that was just added

boot.declare_missing_torchvision_operators()

import encoders  # noqa: E402
import torch  # noqa: E402
import weights  # noqa: E402
from dataset import draw_bytes  # noqa: E402
from encoders import SETTINGS, FacePainter, IdentityLoss, Sitting, bare_caption, sittings  # noqa: E402
from identity import identities  # noqa: E402
from results import save_sheet  # noqa: E402
from scorer import Scorer  # noqa: E402
from scores import Spread, verdict  # noqa: E402
from sheet import Row, draw_sheet  # noqa: E402
from subjects import PEOPLE  # noqa: E402
from torch import Tensor  # noqa: E402

from comfyui_personalize.trainers.sampling import to_pictures  # noqa: E402

CHECKPOINT = "world_sdxl.safetensors"
ALONE, BEFORE, DENOISING, AHEAD = "base model alone", "before training", "denoising alone", "looking ahead too"
RISES = "Training makes the people that are drawn more like their references"
AHEAD_ADDS = "Looking ahead makes them more alike than as many steps of denoising alone"
PARTS = 6
"""Into how many parts of the training its losses are summed up."""


@dataclass(frozen=True)
class Extent:
    """How much is trained and drawn."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    """Of the optimizer, for both ways of training."""
    lcm_steps: int = 100
    taught: int = 100
    """People to learn from, and pictures of each."""
    each: int = 6
    strangers: int = 9
    """People to be drawn besides the held-out ones."""
    drawn: int = 4
    """Pictures of each of them."""


@dataclass(frozen=True)
class Record:
    """Pictures that one encoder drew, and what was read in them."""

    method: str
    seed: int
    likeness: float
    """Mean cosine with the reference, by the identity network."""
    others: float
    """The same with somebody else's reference: what all pictures have in common."""
    accepted: float
    """Share of the pictures that the network takes for the reference's person."""
    background: float
    """Share of the pictures with the background that was asked for, by the scorer."""
    pictures: Tensor
    """(n, 3, 64, 64) in -1..1."""
    losses: tuple[float, ...] = ()
    values: float = 0.0
    """Norm of the adapter's value weights, relative to the prompt's."""
    minutes: float = 0.0
    """Of training."""


def run(extent: Extent, work: Path) -> tuple[list[Record], list[Sitting], Tensor]:
    """All records, and the pictures' sittings and references (n, 3, 64, 64) in -1..1."""
    checkpoint = weights.path_of(CHECKPOINT)
    models = encoders.write_start(work / "models", checkpoint)
    people = encoders.write_people(work / "people", "taught", extent.taught, extent.each)
    lcm = encoders.write_lcm_lora(work / "models" / "lcm.safetensors", checkpoint, people, steps=extent.lcm_steps)
    models = replace(models, lcm_lora=lcm)
    asked = sittings([*PEOPLE.values(), *identities("encoders/strangers", extent.strangers)], extent.drawn)
    references = torch.stack([draw_bytes(one.reference) for one in asked]).float() / 127.5 - 1
    bench = Bench(asked, references)
    records = []
    for seed in extent.seeds:
        start = FacePainter(checkpoint, models)
        records += [bench.record(ALONE, seed, start, alone=True), bench.record(BEFORE, seed, start)]
        for method in (DENOISING, AHEAD):
            began = time.monotonic()
            told = {"steps": extent.steps, "ahead": method == AHEAD, "seed": seed}
            done = encoders.teach(checkpoint, models, people, work / "out", **told)
            minutes = (time.monotonic() - began) / 60
            painter = FacePainter(checkpoint, models, done.path)
            record = bench.record(method, seed, painter)
            records.append(replace(record, losses=done.losses, values=painter.adapter_values(), minutes=minutes))
            print(f"{method}, seed {seed}: {record.likeness:.3f} after {minutes:.1f} minutes", flush=True)
    return records, asked, references


class Bench:
    """Draws and reads the sittings."""

    def __init__(self, asked: Sequence[Sitting], references: Tensor):
        self.asked, self.references = asked, references
        self.judge, self.scorer = IdentityLoss(), Scorer.load()

    def record(self, method: str, seed: int, painter: FacePainter, *, alone: bool = False) -> Record:
        """Args: alone: draw without the encoder."""
        seeds = [1000 * seed + number for number in range(len(self.asked))]
        prompts = [bare_caption(one.asked) for one in self.asked]
        pictures = painter.draw(prompts, seeds, None if alone else self.references)
        likeness = self.judge.likeness(pictures, self.references)
        others = self.judge.likeness(pictures, self.references.roll(len(self.asked) // 2, 0))
        read = self.scorer.read(((pictures + 1) / 2).clamp(0, 1)).names("background")
        right = [found == one.asked.background for found, one in zip(read, self.asked, strict=True)]
        accepted = (likeness > self.judge.net.threshold).float().mean()
        return Record(
            method,
            seed,
            likeness.mean().item(),
            others.mean().item(),
            accepted.item(),
            sum(right) / len(right),
            pictures,
        )


# The report


def claims(records: Sequence[Record]) -> dict[str, str]:
    """What is claimed -> whether it is so with every seed."""

    def likeness(method: str) -> list[float]:
        return [record.likeness for record in records if record.method == method]

    before, denoising, ahead = (likeness(method) for method in (BEFORE, DENOISING, AHEAD))
    return {
        RISES: verdict([after > then for after, then in zip(ahead, before, strict=True)]),
        AHEAD_ADDS: verdict([after > without for after, without in zip(ahead, denoising, strict=True)]),
    }


def report(records: Sequence[Record], extent: Extent, minutes: float, people: int) -> str:
    """results_lookahead.md."""
    settings = ", ".join(f"{name} {SETTINGS[name]}" for name in ("batch_size", "learning_rate", "lora_rank"))
    lines = [
        "# What training a face encoder does on the small world",
        "",
        f"Written by `python tests/world/results_lookahead.py` on {datetime.now(UTC).date()} in {minutes:.0f} minutes. "
        f"Machine: {weights.machine()}.",
        "",
        f"Encoders are trained with the recipe on {extent.taught} people made up at random, {extent.each} pictures of "
        f"each, for {extent.steps} optimizer steps ({settings}); they start from an adapter that adds nothing. Then "
        f"{people} people whom neither they nor the base model have seen are drawn, {extent.drawn} pictures of each, "
        "from one picture and a prompt that says place, background and style. *likeness*: mean cosine with the "
        "reference by the identity network, *to others* with somebody else's reference; *accepted*: share of pictures "
        "above the network's threshold; *background*: share that is right, by the scorer. Mean ± standard deviation "
        f"over the seeds {', '.join(map(str, extent.seeds))}.",
        "",
        "The loss of looking ahead comes from the identity network that also measures: what it shows is that the "
        "gradient reaches the encoder and carries over to strangers, not how good a face is by another judge. The LCM "
        f"LoRA was distilled for this page in {extent.lcm_steps} steps.",
        "",
        *(f"- {claim}: **{found}**." for claim, found in claims(records).items()),
        "",
        "| encoder | likeness | to others | accepted | background | adapter's values | training |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in (ALONE, BEFORE, DENOISING, AHEAD):
        mine = [record for record in records if record.method == method]
        columns = ("likeness", "others", "accepted", "background", "values")
        cells = [str(Spread.of([getattr(record, name) for record in mine])) for name in columns]
        spent = sum(record.minutes for record in mine) / len(mine)
        lines.append(f"| {' | '.join([method, *cells, f'{spent:.1f} min' if spent else '–'])} |")
    lines += ["", "![References and pictures](results/lookahead.jpg)", "", "## Losses", ""]
    lines += [f"Means over each of {PARTS} parts of the training, first seed.", ""]
    lines += [f"| {' | '.join(['loss', *(str(part + 1) for part in range(PARTS))])} |", "| --- " * (PARTS + 1) + "|"]
    for method, losses in curves(records, extent.seeds[0]).items():
        lines.append(f"| {method} | {' | '.join(f'{value:.4f}' for value in losses)} |")
    return "\n".join(lines) + "\n"


def curves(records: Sequence[Record], seed: int) -> dict[str, list[float]]:
    """Loss -> its mean in each part of the training."""
    found = {record.method: record.losses for record in records if record.seed == seed and record.losses}
    kinds = {
        f"noise, {DENOISING}": found[DENOISING],
        f"noise, {AHEAD}": found[AHEAD][::2],
        f"1 - likeness of the preview, times {encoders.LOSS_WEIGHT:g}": found[AHEAD][1::2],
    }
    parts = {name: torch.tensor(losses).tensor_split(PARTS) for name, losses in kinds.items()}
    return {name: [part.mean().item() for part in split] for name, split in parts.items()}


def sheet(records: Sequence[Record], asked: Sequence[Sitting], references: Tensor, drawn: int, seed: int):
    """References and what was drawn of them, a column for each person."""
    places = range(0, len(asked), drawn)[:8]
    labels = [bare_caption(asked[place].asked) for place in places]
    mine = {record.method: record.pictures for record in records if record.seed == seed}
    rows = [Row("reference", labels, to_pictures(references[list(places)]))]
    rows += [Row(method, [], to_pictures(mine[method][list(places)])) for method in (ALONE, BEFORE, DENOISING, AHEAD)]
    return draw_sheet(
        "People drawn from one picture",
        "Each column a person whom no model has seen, a prompt and a seed of the noise. The prompt says nothing of "
        "the face.",
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few people and steps")
    parser.add_argument("--steps", type=int, default=Extent.steps, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=len(Extent.seeds), help="how many seeds")
    parser.add_argument("--out", type=Path, help="folder of results_lookahead.md; tests/world, or its work folder")
    arguments = parser.parse_args()
    extent = Extent(seeds=tuple(range(arguments.seeds)), steps=arguments.steps)
    if arguments.quick:
        extent = Extent(seeds=(0,), steps=8, lcm_steps=4, taught=6, strangers=1, drawn=2)
    out = arguments.out or (HERE / "work" / "results" if arguments.quick else HERE)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        records, asked, references = run(extent, Path(work))
    (out / "results").mkdir(parents=True, exist_ok=True)
    save_sheet(sheet(records, asked, references, extent.drawn, extent.seeds[0]), out / "results" / "lookahead.jpg")
    text = report(records, extent, (time.monotonic() - started) / 60, len(asked) // extent.drawn)
    (out / "results_lookahead.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
