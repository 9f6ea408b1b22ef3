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
from autoencoder import NarrowAutoencoder, latent_penalty, psnr, reconstruction_loss, taesd_tensors  # noqa: E402
from dataset import Examples, in_unit_range, make_examples  # noqa: E402
from diffusion import Denoiser, cache_latents, train_text_to_image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from training import Plan, fit, in_processes, rank  # noqa: E402

from comfyui_personalize.trainers.tokenizer import load_tokenizer  # noqa: E402
from models import MODELS, build, checkpoint_tensors, warm_start  # noqa: E402

EXAMPLES = 24000
UNSEEN = 200
"""Examples at the end of the list that nothing is trained on."""
SEED = 1
SD15 = Plan(steps=2200, batch=64, lr=2e-3, flat=0.4, clip=1.0, ema=0.998)
SDXL = Plan(steps=1500, batch=64, lr=2e-3, flat=0.4, clip=1.0, ema=0.998)
"""Shorter, because it begins where the other ended."""
AUTOENCODER = Plan(steps=4500, batch=16, lr=2e-3, flat=0.5)
DECODER = Plan(steps=1500, batch=16, lr=1e-3, flat=0.2)
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
        return f"{psnr(model.decode(latents), unseen):.2f} dB, latents {latents.mean():.2f} ± {latents.std():.2f}"

    fit("autoencoder", model, AUTOENCODER, loss_of, work, look, look_every=250)
    if rank() == 0:
        torch.save(model.state_dict(), work / "autoencoder.weights.pt")


def load_trained_autoencoder(work: Path, stage: str = "autoencoder") -> NarrowAutoencoder:
    model = NarrowAutoencoder()
    model.load_state_dict(torch.load(work / f"{stage}.weights.pt", weights_only=True))
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


def train_sd15(work: Path, processes: int) -> None:
    _encode_examples(work)
    in_processes(processes, work, _train_text_to_image, work, "world_sd15", SD15)


def train_sdxl(work: Path, processes: int) -> None:
    _encode_examples(work)
    in_processes(processes, work, _train_text_to_image, work, "world_sdxl", SDXL)


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
        return reconstruction_loss(in_unit_range(examples.pictures, chosen), model.decode(noisy), weight)

    def look(step: int) -> str:
        return f"{psnr(model.decode(latents[-UNSEEN:]), in_unit_range(examples.pictures[-UNSEEN:])):.2f} dB"

    fit("decoder", decoder, DECODER, loss_of, work, look, look_every=250)
    if rank() == 0:
        torch.save(model.state_dict(), work / "decoder.weights.pt")


def write_checkpoints(work: Path, processes: int) -> None:
    """The two models as single files in half precision."""
    autoencoder = load_trained_autoencoder(work, "decoder")
    for name in MODELS:
        denoiser = Denoiser(build(name))
        denoiser.load_state_dict(torch.load(work / f"{name}.weights.pt", weights_only=True))
        model = denoiser.model
        tensors = checkpoint_tensors(model, model.unet.state_dict(), [part.state_dict() for part in model.encoders])
        for part, weight in taesd_tensors(autoencoder, model.family.latent_scale).items():
            tensors[f"first_stage_model.{part}"] = weight
        tensors = {part: weight.half().contiguous() for part, weight in tensors.items()}
        save_file(tensors, work / f"{name}.safetensors", metadata={"format": "pt"})


STAGES = {
    "examples": draw_examples,
    "autoencoder": train_autoencoder,
    "sd15": train_sd15,
    "sdxl": train_sdxl,
    "decoder": train_decoder,
    "checkpoints": write_checkpoints,
}

if __name__ == "__main__":
    main()
