"""What is measured: subjects and styles taught to the small world's models, and pictures drawn with what was learned.

Each function from a Task to Records is one piece of work for one process with one computing thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

import boot  # noqa: E402 - lies in a folder that was just added

boot.declare_missing_torchvision_operators()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import weights  # noqa: E402
from methods import METHODS, STATE_EVERY, STEPS, Job, Painter  # noqa: E402
from prompts import REPORTING, Prompt, in_style, suitable  # noqa: E402
from scenes import HELD_OUT_STYLES  # noqa: E402
from scorer import FILE as SCORER_FILE  # noqa: E402
from scorer import Scorer  # noqa: E402
from scores import Scores, scores_of  # noqa: E402
from subjects import SUBJECTS, WORD, style_token, write_style, write_subject  # noqa: E402

from models import MODELS  # noqa: E402

MAIN_BASE, OTHER_BASE = "world_sdxl", "world_sd15"
"""All is measured with the first; on the second, with one subject, what the whole training gives."""
BASE_WORD, BASE_DESCRIPTION = "base model, class word", "base model, described"
REWARD_SCALE = 2.0
"""Of reward guidance where one scale stands for it."""


def rewarded_label(scale: float) -> str:
    return f"dco, reward scale {scale:g}"


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    subjects: tuple[str, ...]
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    """Training steps at which pictures are drawn, rising; the last is the whole training."""
    scales: tuple[float, ...]
    """Of reward guidance, rising."""
    styles: tuple[str, ...]
    drawn: int = 2
    """Pictures of each prompt, with seeds of their own."""
    prompts: tuple[Prompt, ...] = REPORTING


FULL = Extent(("zib", "mok"), (0, 1, 2), (50, 100, 200, STEPS), (0.0, 1.0, REWARD_SCALE, 4.0), HELD_OUT_STYLES)
QUICK = Extent(("zib",), (0,), (STATE_EVERY, 2 * STATE_EVERY), (0.0, 1.0, REWARD_SCALE), HELD_OUT_STYLES[:1], drawn=1)


@dataclass(frozen=True)
class Files:
    """Where the networks are, and where what is learned goes."""

    models: dict[str, Path]
    scorer: Path
    work: Path

    @classmethod
    def committed(cls, work: Path) -> Files:
        """The committed weights, or a WeightsError."""
        models = {name: weights.path_of(f"{name}.safetensors") for name in MODELS}
        return cls(models, weights.path_of(SCORER_FILE), work)

    @classmethod
    def of_folder(cls, folder: Path, work: Path) -> Files:
        """Weights that are not committed, or not yet."""
        return cls({name: folder / f"{name}.safetensors" for name in MODELS}, folder / SCORER_FILE, work)


@dataclass(frozen=True)
class Task:
    """One subject or style or both, one base model, one seed."""

    files: Files
    extent: Extent
    base: str
    seed: int
    subject: str = ""
    style: str = ""

    @property
    def checkpoint(self) -> Path:
        return self.files.models[self.base]

    def job(self, what: str, steps: int) -> Job:
        """The training of this subject or style."""
        output = self.files.work / self.base
        lesson = output / f"seed{self.seed}" / what  # tasks that run at the same time do not share a folder
        if what in SUBJECTS:
            write_subject(lesson, SUBJECTS[what])
        else:
            write_style(lesson, what)
        return Job(self.checkpoint, lesson, output, steps, self.seed)


@dataclass(frozen=True)
class Record:
    """A set of pictures, what they were drawn with, and what the scorer read in them."""

    base: str
    subject: str
    seed: int
    method: str
    """Of METHODS, or another label of what drew them."""
    steps: int
    scale: float | None
    style: str
    seconds: float
    """What the training took; 0 where it was not this record's."""
    scores: Scores
    prompts: tuple[str, ...]
    pictures: np.ndarray
    """The first picture of each prompt, (n, 64, 64, 3) bytes."""


def run(extent: Extent, files: Files, processes: int = 2) -> list[Record]:
    """Everything, in the order of the tasks; each process has one computing thread."""
    each = [(subject, seed) for seed in extent.seeds for subject in extent.subjects]
    lessons = [Task(files, extent, MAIN_BASE, seed, subject) for subject, seed in each]
    lessons += [Task(files, extent, OTHER_BASE, seed, extent.subjects[0]) for seed in extent.seeds]
    lessons += [Task(files, extent, MAIN_BASE, seed, style=style) for seed in extent.seeds for style in extent.styles]
    merges = [Task(files, extent, MAIN_BASE, seed, subject, style) for subject, seed in each for style in extent.styles]
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        records: list[Record] = []
        for tasks in (lessons, merges):  # the second need what the first have learned
            for done in pool.map(perform, tasks):
                records += done
    return records


def perform(task: Task) -> list[Record]:
    if task.subject and task.style:
        return merge(task)
    return teach_subject(task) if task.subject else teach_style(task)


def teach_subject(task: Task) -> list[Record]:
    """A subject by each method: pictures after every length of training, then with every reward scale."""
    subject, extent = SUBJECTS[task.subject], task.extent
    whole = task.base == MAIN_BASE
    bench = Bench(task, suitable(extent.prompts, subject.looks))
    untaught = Painter(task.checkpoint)
    records = [
        bench.record(BASE_WORD, untaught, bench.words(WORD)),
        bench.record(BASE_DESCRIPTION, untaught, bench.words(subject.description)),
    ]
    named = bench.words(subject.token)
    for method, learn in METHODS.items():
        seconds = 0.0
        for steps in extent.lengths if whole else extent.lengths[-1:]:
            started = time.perf_counter()
            learned = learn(task.job(task.subject, steps))
            seconds += time.perf_counter() - started
            painter = Painter(task.checkpoint, [learned])
            records.append(bench.record(method, painter, named, steps=steps, seconds=seconds))
        if method == "dco":
            for scale in extent.scales if whole else (REWARD_SCALE,):
                guidance = {"base_prompts": bench.words(WORD), "reward_scales": (scale,)}
                records.append(
                    bench.record(rewarded_label(scale), painter, named, steps=steps, scale=scale, **guidance)
                )
    return records


def teach_style(task: Task) -> list[Record]:
    """A style by each method, for `merge`; nothing is drawn yet."""
    for learn in METHODS.values():
        learn(task.job(task.style, task.extent.lengths[-1]))
    return []


def merge(task: Task) -> list[Record]:
    """A subject's and a style's LoRAs on the model together, which were trained apart."""
    subject, steps = SUBJECTS[task.subject], task.extent.lengths[-1]
    bench = Bench(task, in_style(suitable(task.extent.prompts, subject.looks), task.style))
    in_words = bench.words(subject.token)
    styled = [words.replace(f"in {task.style} style", f"in {style_token(task.style)} style") for words in in_words]
    plain = [words.replace(f" in {task.style} style", "") for words in bench.words(WORD)]
    records = []
    for method, learn in METHODS.items():
        learned = [learn(task.job(what, steps)) for what in (task.subject, task.style)]  # reads back what there is
        alone, both = Painter(task.checkpoint, learned[:1]), Painter(task.checkpoint, learned)
        records.append(bench.record(f"{method}, subject's LoRA alone", alone, in_words, steps=steps))
        records.append(bench.record(f"{method}, both LoRAs", both, styled, steps=steps))
        if method == "dco":
            guidance = {"base_prompts": plain, "reward_scales": (REWARD_SCALE, REWARD_SCALE)}
            label = f"{rewarded_label(REWARD_SCALE)} each"
            records.append(bench.record(label, both, styled, steps=steps, scale=REWARD_SCALE, **guidance))
    return records


class Bench:
    """Draws and scores the pictures of one task."""

    def __init__(self, task: Task, prompts: Sequence[Prompt], drawn: int | None = None):
        """Args: drawn: pictures of each prompt; None draws as many as the task's extent says."""
        self.task, self.kept = task, len(prompts)
        self.prompts = [*prompts] * (drawn or task.extent.drawn)
        self.seeds = [1000 * task.seed + number for number in range(len(self.prompts))]
        self.scorer = Scorer.load(task.files.scorer)

    def words(self, name: str) -> list[str]:
        """The prompts for a subject of this name."""
        return [prompt.naming(name) for prompt in self.prompts]

    def record(
        self,
        method: str,
        painter: Painter,
        words: Sequence[str],
        *,
        steps: int = 0,
        scale: float | None = None,
        seconds: float = 0.0,
        **guidance: Sequence,
    ) -> Record:
        """Draw, read and keep the first pictures.

        Args:
            guidance: base_prompts and reward_scales, as Painter.draw takes them.
        """
        task = self.task
        pictures = painter.draw(words, self.seeds, **guidance)
        scores = scores_of(self.scorer.read(pictures), self.prompts, SUBJECTS[task.subject])
        as_bytes = (pictures[: self.kept] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return Record(
            base=task.base,
            subject=task.subject,
            seed=task.seed,
            method=method,
            steps=steps,
            scale=scale,
            style=task.style,
            seconds=seconds,
            scores=scores,
            prompts=tuple(words[: self.kept]),
            pictures=as_bytes,
        )


def chosen(records: Iterable[Record], **wanted: object) -> list[Record]:
    """The records whose fields have these values."""
    return [record for record in records if all(getattr(record, name) == value for name, value in wanted.items())]
