"""`make demo`: train a subject on a tiny model, sample with and without reward guidance, lay the results in demo/.

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
sys.path[:0] = [str(TESTS / "host"), str(TESTS / "tiny")]

import find_host  # noqa: E402 - lies in the folder that was just added
from checkpoints import write_tiny_checkpoint  # noqa: E402
from drawings import TOKEN, draw_all  # noqa: E402
from job import CHECKPOINT, COLUMNS, PLAIN, PROMPTS, Job, Outcome  # noqa: E402
from PIL import Image  # noqa: E402
from sheet import Row, draw_sheet  # noqa: E402

STEPS = 160


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TESTS.parent / "demo", help="folder of the results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--sampling-steps", type=int, default=12, help="steps per picture (default 12)")
    parser.add_argument("--without-comfyui", action="store_true", help="use the command line even if there is a host")
    arguments = parser.parse_args()
    started = time.monotonic()
    out = arguments.out.resolve()
    try:
        comfyui = None if arguments.without_comfyui else find_host.find_comfyui()
        outcome = work(out, comfyui, arguments.steps, arguments.sampling_steps)
        made = collect(out, outcome, "in ComfyUI" if comfyui else "from the command line")
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


def work(out: Path, comfyui: Path | None, steps: int, sampling_steps: int) -> Outcome:
    """Prepare pictures and base model, then train and sample; earlier results of the demo are replaced."""
    for folder in ("work", "pictures"):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / "work").mkdir(parents=True)
    print("Drawing the training pictures and writing a tiny SDXL checkpoint of random weights ...", flush=True)
    checkpoint = write_tiny_checkpoint("sdxl", out / "work" / CHECKPOINT)
    job = Job(out / "work", checkpoint, draw_all(), steps, sampling_steps)
    if comfyui is None:
        print("Without ComfyUI: the command line trainers do the job.", flush=True)
        import on_command_line

        return on_command_line.run(job)
    import in_comfyui

    return in_comfyui.run(job, comfyui)


def collect(out: Path, outcome: Outcome, where: str) -> dict[Path, str]:
    """Lay the results in `out` under plain names; what each is, by path."""
    drawings = draw_all()
    (out / "pictures").mkdir()
    kept = {}
    for number, prompt in enumerate(PROMPTS, start=1):
        for scale in COLUMNS:
            name = f"prompt_{number}_{'plain' if scale == PLAIN else f'reward_{scale:g}'}.png"
            kept[prompt, scale] = Path(shutil.copyfile(outcome.pictures[prompt, scale], out / "pictures" / name))
    rows = [Row(f"Training pictures\nof a {TOKEN}", [d.name for d in drawings], [d.picture for d in drawings])]
    for prompt in PROMPTS:
        pictures = [Image.open(kept[prompt, scale]) for scale in COLUMNS]
        rows.append(Row(prompt, list(COLUMNS.values()), pictures))
    sheet = draw_sheet(
        "Reward guidance (DCO) on a tiny model",
        f"Trained and sampled {where}. The base model has random weights, so its pictures are abstract; what they "
        "show is how the reward scale leads them further and further away from the base model.",
        rows,
    )
    sheet.save(out / "pictures.png")
    outcome.curve.save(out / "loss_curve.png")
    made = {
        out / "pictures.png": "the training pictures and what was sampled, labelled",
        out / "loss_curve.png": "loss of every training step",
    }
    for path in outcome.trained:
        copy = out / path.parent.name / path.name  # in the folders where ComfyUI keeps such files
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        made[copy] = "the trained LoRA" if path.parent.name == "loras" else f"the learned token {TOKEN}"
    made[Path(shutil.move(out / "work" / CHECKPOINT, out / CHECKPOINT))] = "the tiny base model"
    shutil.rmtree(out / "work")
    return made | {path: "one sampled picture, with its settings inside" for path in kept.values()}


if __name__ == "__main__":
    sys.exit(main())
