"""Train the small world's networks and write their files: python tests/world/train.py

Stages follow one another and each can be stopped and started again; `--only` runs one of them. Two CPU cores need about
an hour and a half, a GPU (`--device cuda`) does the same steps on the same batches. The committed weights are this
script's output; the card beside them says on what machine and at which commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

import boot  # noqa: E402 - lies in the folder that was just added

boot.declare_missing_torchvision_operators()

import clip_pair  # noqa: E402
import identity  # noqa: E402
import scorer  # noqa: E402
import torch  # noqa: E402
import weights  # noqa: E402
from autoencoder import NarrowAutoencoder, latent_penalty, psnr, reconstruction_loss, taesd_tensors  # noqa: E402
from clip_pair import train_clip  # noqa: E402
from dataset import CAPTIONS, EXAMPLES, SEED, UNSEEN, draw_examples, in_unit_range, load_examples  # noqa: E402
from diffusion import Denoiser, cache_latents, train_text_to_image  # noqa: E402
from identity import train_identity  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from scorer import FILE as SCORER_FILE  # noqa: E402
from scorer import Scorer, train_scorer  # noqa: E402
from training import DEVICE_VARIABLE, Plan, device, fit, in_processes, rank  # noqa: E402

from models import MODELS, build, checkpoint_tensors, warm_start  # noqa: E402

SD15 = Plan(steps=2200, batch=64, lr=2e-3, flat=0.4, clip=1.0, ema=0.998)
SDXL = Plan(steps=1100, batch=64, lr=2e-3, flat=0.4, clip=1.0, ema=0.998)
"""Shorter, because it begins where the other ended."""
AUTOENCODER = Plan(steps=4500, batch=16, lr=2e-3, flat=0.5)
DECODER = Plan(steps=1500, batch=16, lr=1e-3, flat=0.2)
OUTPUTS = {
    "world_sd15.safetensors": (SD15.steps, f"{EXAMPLES} drawn pictures with {CAPTIONS} captions each"),
    "world_sdxl.safetensors": (SDXL.steps, f"the same {EXAMPLES} pictures, beginning from world_sd15"),
    SCORER_FILE: (scorer.PLAN.steps, "pictures with labels, also of the held-out characters, people and styles"),
    clip_pair.FILE: (clip_pair.PLAN.steps, "the text-to-image models' pictures and captions"),
    identity.FILE: (identity.PLAN.steps, "portraits of people made up at random"),
}
"""File -> steps of its training, and what it saw."""
LATENT_NOISE = 0.03
OBJECT_WEIGHT = 4.0
CAPTIONS_MEASURED = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of data and unfinished states")
    parser.add_argument("--processes", type=int, default=2, help="CPU processes that train together")
    parser.add_argument("--only", choices=STAGES, help="run this stage alone")
    parser.add_argument("--device", default="cpu", help="cuda trains in one process on a GPU")
    arguments = parser.parse_args()
    os.environ[DEVICE_VARIABLE] = arguments.device
    if arguments.device != "cpu":
        arguments.processes = 1
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if arguments.only in (None, name):
            started = time.monotonic()
            stage(arguments.work, arguments.processes)
            for file, (steps, data) in OUTPUTS.items():
                if weights.STAGES[file] == name:
                    run = weights.Run.now(seed=SEED, steps=steps, data=data)
                    (arguments.work / f"{file}.run.json").write_text(json.dumps(asdict(run)), encoding="utf-8")
            print(f"{name}: done in {(time.monotonic() - started) / 60:.1f} min", flush=True)


def train_autoencoder(work: Path, processes: int) -> None:
    in_processes(processes, work, _train_autoencoder, work)


def _train_autoencoder(work: Path) -> None:
    torch.manual_seed(SEED)
    examples = load_examples(work)
    model = NarrowAutoencoder().to(memory_format=torch.channels_last)
    unseen = in_unit_range(examples.pictures[-UNSEEN:])

    def loss_of(count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(examples) - UNSEEN, (count,), generator=generator)
        pictures = in_unit_range(examples.pictures, chosen).contiguous(memory_format=torch.channels_last).to(device())
        weight = (1 + (OBJECT_WEIGHT - 1) * in_unit_range(examples.masks, chosen)).to(device())
        latents = model.encode(pictures)
        noise = torch.randn(latents.shape, generator=generator).to(device())
        decoded = model.decode(latents + LATENT_NOISE * noise)
        return reconstruction_loss(pictures, decoded, weight) + 0.01 * latent_penalty(latents)

    def look(step: int) -> str:
        latents = model.encode(unseen)
        return f"{psnr(model.decode(latents), unseen):.2f} dB, latents {latents.mean():.2f} ± {latents.std():.2f}"

    fit("autoencoder", model, AUTOENCODER, loss_of, work, look, look_every=250)
    if rank() == 0:
        torch.save(model.state_dict(), work / "autoencoder.weights.pt")


def load_trained_autoencoder(work: Path, stage: str = "autoencoder") -> NarrowAutoencoder:
    model = NarrowAutoencoder()
    model.load_state_dict(torch.load(work / f"{stage}.weights.pt", weights_only=True))
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


def train_sd15(work: Path, processes: int) -> None:
    _train_model(work, processes, "world_sd15", SD15)


def train_sdxl(work: Path, processes: int) -> None:
    _train_model(work, processes, "world_sdxl", SDXL)


def _train_model(work: Path, processes: int, name: str, plan: Plan) -> None:
    _encode_examples(work)
    in_processes(processes, work, _train_text_to_image, work, name, plan)
    write_checkpoint(work, name)


def _encode_examples(work: Path) -> torch.Tensor:
    return cache_latents(load_examples(work), load_trained_autoencoder(work), work / "latents.pt")


def _train_text_to_image(work: Path, name: str, plan: Plan) -> None:
    torch.manual_seed(SEED)
    model = build(name)
    if name == "world_sdxl":
        first = Denoiser(build("world_sd15"))
        first.load_state_dict(torch.load(work / "world_sd15.weights.pt", weights_only=True))
        warm_start(model, first.model)
    latents = _encode_examples(work)[:-UNSEEN]
    train_text_to_image(Denoiser(model), load_examples(work), latents, load_trained_autoencoder(work), plan, work)


def train_decoder(work: Path, processes: int) -> None:
    in_processes(processes, work, _train_decoder, work)


def _train_decoder(work: Path) -> None:
    """Go on with the decoder alone: the latents that the models were trained on stay what they are."""
    torch.manual_seed(SEED)
    examples, latents = load_examples(work), _encode_examples(work)
    model = load_trained_autoencoder(work)
    decoder = model.decoder.requires_grad_(True)

    def loss_of(count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(examples) - UNSEEN, (count,), generator=generator)
        weight = 1 + (OBJECT_WEIGHT - 1) * in_unit_range(examples.masks, chosen)
        noisy = latents[chosen] + LATENT_NOISE * torch.randn(latents[chosen].shape, generator=generator)
        pictures = in_unit_range(examples.pictures, chosen).to(device())
        return reconstruction_loss(pictures, model.decode(noisy.to(device())), weight.to(device()))

    def look(step: int) -> str:
        return f"{psnr(model.decode(latents[-UNSEEN:]), in_unit_range(examples.pictures[-UNSEEN:])):.2f} dB"

    fit("decoder", decoder, DECODER, loss_of, work, look, look_every=250)
    if rank() == 0:
        torch.save(model.state_dict(), work / "decoder.weights.pt")


def write_checkpoint(work: Path, name: str) -> None:
    """A model as a single file in half precision."""
    denoiser = Denoiser(build(name))
    denoiser.load_state_dict(torch.load(work / f"{name}.weights.pt", weights_only=True))
    model = denoiser.model
    tensors = checkpoint_tensors(model, model.unet.state_dict(), [part.state_dict() for part in model.encoders])
    for part, weight in taesd_tensors(load_trained_autoencoder(work, "decoder"), model.family.latent_scale).items():
        tensors[f"first_stage_model.{part}"] = weight
    tensors = {part: weight.half().contiguous() for part, weight in tensors.items()}
    save_file(tensors, work / f"{name}.safetensors", metadata={"format": "pt"})


def describe_files(work: Path, processes: int) -> None:
    """Measure the files that there are, copy them to weights/ and write the card about them."""
    from evaluate import evaluate  # of no use to the processes that train

    torch.set_num_threads(processes)
    weights.FOLDER.mkdir(exist_ok=True)
    runs, scores, sheets = {}, {}, {}
    for file in (file for file in weights.STAGES if (work / file).exists()):
        shutil.copyfile(work / file, weights.FOLDER / file)
        runs[file] = weights.Run(**json.loads((work / f"{file}.run.json").read_text(encoding="utf-8")))
    reader = Scorer.load(weights.FOLDER / SCORER_FILE)
    for file in runs:
        if file.removesuffix(".safetensors") in MODELS:
            sheets[file] = weights.FOLDER / file.replace(".safetensors", ".jpg")
            scores[file] = evaluate(weights.FOLDER / file, count=CAPTIONS_MEASURED, scorer=reader, sheet=sheets[file])
        elif file == SCORER_FILE:
            scores[file] = reader.accuracies
        else:
            with safe_open(weights.FOLDER / file, "numpy") as content:
                scores[file] = json.loads(content.metadata()["scores"])
    weights.write_card(runs, scores, sheets)


STAGES = {
    "examples": lambda work, processes: draw_examples(work),
    "autoencoder": train_autoencoder,
    "decoder": train_decoder,
    "sd15": train_sd15,
    "sdxl": train_sdxl,
    "scorer": train_scorer,
    "clip": train_clip,
    "identity": train_identity,
    "card": describe_files,
}

if __name__ == "__main__":
    main()
