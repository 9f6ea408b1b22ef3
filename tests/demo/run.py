"""`make demo`: teach a tiny model a character it never saw, sample before and after, lay the results in demo/.

With a ComfyUI the shipped workflows are posted to it; without one the command line trainers do the same job.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

# Layers of a tiny model are too small to share between threads; handing them over costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "host"), str(TESTS / "tiny"), str(TESTS / "world")]

import boot  # noqa: E402 - lies in one of the folders that were just added

boot.declare_missing_torchvision_operators()  # an environment made for a host has a torchvision in it

import find_host  # noqa: E402
from job import CHECKPOINT, COLUMNS, PROMPTS, SUBJECT, Job, Outcome, personalized  # noqa: E402
from methods import SAMPLING_STEPS, STEPS  # noqa: E402
from PIL import Image  # noqa: E402
from sheet import Row, draw_sheet  # noqa: E402
from subjects import write_subject  # noqa: E402
from weights import path_of  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TESTS.parent / "demo", help="folder of the results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument(
        "--sampling-steps", type=int, default=SAMPLING_STEPS, help=f"steps per picture (default {SAMPLING_STEPS})"
    )
    parser.add_argument("--without-comfyui", action="store_true", help="use the command line even if there is a host")
    arguments = parser.parse_args()
    started = time.monotonic()
    out = arguments.out.resolve()
    try:
        comfyui = None if arguments.without_comfyui else find_host.find_comfyui()
        job = prepare(out, arguments.steps, arguments.sampling_steps)
        outcome = work(job, comfyui)
        made = collect(out, job, outcome, "in ComfyUI" if comfyui else "from the command line")
    except (RuntimeError, FileNotFoundError) as error:
        print(f"The demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was cancelled.", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - started:.0f} s. Files in {out}:")
    for path, what in made.items():
        print(f"  {str(path.relative_to(out)):34} {what}")
    return 0


def prepare(out: Path, steps: int, sampling_steps: int) -> Job:
    """Draw the training pictures; earlier results of the demo are removed."""
    checkpoint = path_of(CHECKPOINT)
    for folder in ("work", "pictures"):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / "work").mkdir(parents=True)
    print(f"Drawing five pictures of {SUBJECT.token}, a character that the base model never saw ...", flush=True)
    lessons = out / "work" / "lessons"
    write_subject(lessons, SUBJECT)
    return Job(out / "work", checkpoint, lessons, steps, sampling_steps)


def work(job: Job, comfyui: Path | None) -> Outcome:
    """Train and sample."""
    if comfyui is None:
        print("Without ComfyUI: the command line trainers do the job.", flush=True)
        import on_command_line

        return on_command_line.run(job)
    import in_comfyui

    return in_comfyui.run(job, comfyui)


def collect(out: Path, job: Job, outcome: Outcome, where: str) -> dict[Path, str]:
    """Lay the results in `out` under plain names; what each is, by path."""
    (out / "pictures").mkdir()
    kept = {}
    for number, prompt in enumerate(PROMPTS, start=1):
        for column in COLUMNS:
            path = out / "pictures" / f"prompt_{number}_{column.file}.png"
            kept[prompt, column] = Path(shutil.copyfile(outcome.pictures[prompt, column], path))
    examples = job.examples()
    lessons = [Image.open(example.picture.path) for example in examples]
    rows = [Row("five training pictures and their captions", [example.caption for example in examples], lessons)]
    for number, prompt in enumerate(PROMPTS):
        pictures = [Image.open(kept[prompt, column]) for column in COLUMNS]
        rows.append(Row(personalized(prompt), [column.label for column in COLUMNS] if number == 0 else [], pictures))
    sheet = draw_sheet(
        f"A tiny model learns a new word: {SUBJECT.token}",
        f"DCO, trained and sampled {where} on a model of 64 x 64 pixels that never saw this character. Reward "
        "guidance sets how much of what was learned goes into a picture.",
        rows,
    )
    sheet.save(out / "pictures.png", optimize=True)
    outcome.curve.save(out / "loss_curve.png")
    made = {
        out / "pictures.png": "the training pictures and what was sampled, labelled",
        out / "loss_curve.png": "loss of every training step",
    }
    for path in outcome.trained:
        copy = out / path.parent.name / path.name  # in the folders where ComfyUI keeps such files
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        made[copy] = "the trained LoRA" if path.parent.name == "loras" else f"the learned token {SUBJECT.token}"
    shutil.rmtree(out / "work")
    return made | {path: "one sampled picture, with its settings inside" for path in kept.values()}


if __name__ == "__main__":
    sys.exit(main())
