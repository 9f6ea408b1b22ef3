"""Train the small world's networks and write their files: python tests/world/train.py

Stages follow one another and each can be stopped and started again; `--only` runs one of them. The committed
weights are this script's output; the card beside them says on what machine and at which commit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

import boot  # noqa: E402 - lies in the folder that was just added

boot.declare_missing_torchvision_operators()

import torch  # noqa: E402
from autoencoder import NarrowAutoencoder, latent_penalty, reconstruction_loss  # noqa: E402
from dataset import Examples, in_unit_range, make_examples  # noqa: E402
from training import Plan, fit, in_processes, rank  # noqa: E402

from comfyui_personalize.trainers.tokenizer import load_tokenizer  # noqa: E402

EXAMPLES = 24000
UNSEEN = 200
"""Examples at the end of the list that nothing is trained on."""
SEED = 1
AUTOENCODER = Plan(steps=6000, batch=16, lr=2e-3, flat=0.5)
LATENT_NOISE = 0.03
OBJECT_WEIGHT = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of data and unfinished states")
    parser.add_argument("--processes", type=int, default=2, help="CPU processes that train together")
    parser.add_argument("--only", choices=STAGES, help="run this stage alone")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if arguments.only in (None, name):
            started = time.monotonic()
            stage(arguments.work, arguments.processes)
            print(f"{name}: done in {(time.monotonic() - started) / 60:.1f} min", flush=True)


def draw_examples(work: Path, processes: int) -> None:
    path = work / "examples.pt"
    if not path.exists():
        examples = make_examples(EXAMPLES, SEED, load_tokenizer())
        torch.save(vars(examples), path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)


def load_examples(work: Path) -> Examples:
    return Examples(**torch.load(work / "examples.pt", weights_only=True, mmap=True))


def train_autoencoder(work: Path, processes: int) -> None:
    in_processes(processes, work, _train_autoencoder, work)


def _train_autoencoder(work: Path) -> None:
    torch.manual_seed(SEED)
    examples = load_examples(work)
    model = NarrowAutoencoder().to(memory_format=torch.channels_last)
    unseen = in_unit_range(examples.pictures[-UNSEEN:])

    def loss_of(count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(examples) - UNSEEN, (count,), generator=generator)
        pictures = in_unit_range(examples.pictures, chosen).contiguous(memory_format=torch.channels_last)
        weight = 1 + (OBJECT_WEIGHT - 1) * in_unit_range(examples.masks, chosen)
        latents = model.encode(pictures)
        decoded = model.decode(latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator))
        return reconstruction_loss(pictures, decoded, weight) + 0.01 * latent_penalty(latents)

    def look(step: int) -> str:
        latents = model.encode(unseen)
        error = (model.decode(latents).clamp(0, 1) - unseen).square().mean((1, 2, 3))
        return f"{-10 * error.mean().log10():.2f} dB, latents {latents.mean():.2f} ± {latents.std():.2f}"

    fit("autoencoder", model, AUTOENCODER, loss_of, work, look, look_every=250)
    if rank() == 0:
        torch.save(model.state_dict(), work / "autoencoder.weights.pt")


STAGES = {"examples": draw_examples, "autoencoder": train_autoencoder}

if __name__ == "__main__":
    main()
