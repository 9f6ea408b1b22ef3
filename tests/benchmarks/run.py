"""Measure, and write RESULTS.md: python tests/benchmarks/run.py [--quick] [--device cuda --full-size].

Ratios are taken side by side in one run; absolute times only say how large the work was.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
sys.path.insert(0, str(HERE))

VAE_ENCODING = 4.9
"""TFLOP of encoding a picture of 1024 × 1024 with SDXL's VAE."""
PERFUSION_HEAD = (
    "| concepts | rows per UNet call | plain model | with concepts | plain model | time ratio | of the time in hooks |"
)
_comfy = None


def helper(path: str):
    """A helper module of the tests, by its path below tests/."""
    name = "personalize_tests_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def write_checkpoint(folder: Path, full: bool) -> Path:
    """A tiny SDXL-like checkpoint with random weights, or one of SDXL's true size that is all zeros."""
    path = folder / "base.safetensors"
    return write_hollow(path, "sdxl") if full else helper("tiny/checkpoints.py").write_tiny_checkpoint("sdxl", path)


def write_hollow(path: Path, family: str) -> Path:
    """A checkpoint of the family's true size that is all zeros."""
    import pytest

    sizes = helper("tiny/full_size.py")
    with pytest.MonkeyPatch.context() as patch:
        sizes.write_hollow(path, sizes.published_shapes(helper("tiny/checkpoints.py"), patch, family))
    return path


def dco_step(checkpoint: Path, device: torch.device, side: int, rounds: int, full: bool) -> list[str]:
    """Table rows: our DCO step against the authors' order of work, with learned tokens and without."""
    import dco_step as job
    from pairs import time_pairs

    from comfyui_personalize.trainers.base import open_base

    lines = []
    for tokens, label in ((True, "subject, one learned token"), (False, "style, no token")):
        base, config = open_base(checkpoint), job.settings(side, device, full)
        ours = job.Ours(base, job.dataset(side, tokens), config, device)
        theirs = job.Authors(base, job.dataset(side, tokens), config, device)
        for one in (ours, theirs):
            one.step()
            one.counter.counts = dict.fromkeys(one.counter.counts, 0)
            one.step()
        counts = [one.counter.counts.copy() for one in (ours, theirs)]
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        pair = time_pairs(ours.step, theirs.step, rounds, synchronize=synchronize)
        del ours, theirs, one
        memory = {
            which: peak_memory("dco_step", which, str(checkpoint), side, device.type, tokens, full)
            for which in ("ours", "authors")
        }
        work = [f"{c['unet_rows']} rows, {c['text_passes']} text passes, {c['vae_pictures']} VAE" for c in counts]
        lines.append(
            f"| {label} | {work[0]} | {work[1]} | {pair.ours * 1e3:.0f} ms | {pair.theirs * 1e3:.0f} ms | "
            f"**{pair.ratio:.2f}** ({pair.spread[0]:.2f}–{pair.spread[1]:.2f}) | {memory['ours']:.0f} MiB | "
            f"{memory['authors']:.0f} MiB | **{memory['ours'] / memory['authors']:.2f}** |"
        )
    return lines


def peak_memory(job: str, *words: str | int | bool) -> float:
    """MiB that this module's ``measure_memory`` finds with these arguments, in a process of its own."""
    command = [sys.executable, str(HERE / "memory.py"), job, json.dumps(words)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])["peak_mib"]


def guidance(checkpoint: Path, host: Path, base: Path, side: int, rounds: int) -> list[str]:
    """Table rows: a guided step in one UNet call against two."""
    import guidance_step

    from comfyui_personalize.models.families import SDXL
    from comfyui_personalize.models.formats import describe, write_safetensors
    from comfyui_personalize.models.lora import LowRankDelta, kohya_tensors
    from comfyui_personalize.trainers.adapters import ATTENTION
    from comfyui_personalize.trainers.base import open_base

    unet = open_base(checkpoint).load_unet()
    deltas = {
        f"unet.{name}": LowRankDelta(torch.randn(4, m.weight.shape[1]) / 8, torch.randn(m.weight.shape[0], 4) / 8)
        for name, m in unet.named_modules()
        if name.endswith(ATTENTION)
    }
    comfy = in_process(host, base)
    from comfyui_personalize import nodes as extension

    metadata = describe("lora/1", family=SDXL.name, method="dco", title="benchmark")
    folder = Path(comfy.folder_paths.get_folder_paths("loras")[0])
    write_safetensors(folder / "benchmark.safetensors", kohya_tensors(deltas, "sdxl"), metadata)
    with torch.inference_mode():
        found = guidance_step.measure(comfy, extension, checkpoint, "benchmark.safetensors", side, rounds)
    pair = found["pair"]
    return [
        f"| {found['ours_rows']} | {found['authors_rows']} | {pair.ours * 1e3:.1f} ms | {pair.theirs * 1e3:.1f} ms | "
        f"**{pair.ratio:.2f}** ({pair.spread[0]:.2f}–{pair.spread[1]:.2f}) | {found['largest_difference']:.1e} |"
    ]


def in_process(host: Path, base: Path):
    """The host's modules in this process, once; it knows the tiny sizes."""
    global _comfy
    if _comfy is None:
        _comfy = helper("host/in_process.py").import_host(host, base)
        helper("host/tinymodels/__init__.py")
    return _comfy


def lookahead(checkpoint: Path, host: Path, base: Path, side: int, rounds: int) -> list[str]:
    """Table rows: a step with a face encoder, with shared attention and without."""
    import lookahead_step

    from comfyui_personalize.models.lookahead import IdentityTokens
    from comfyui_personalize.models.lookahead.identity import Identity, fingerprint

    comfy = in_process(host, base)
    encoder = helper("tiny/lookahead.py").make_encoder("sdxl")
    width = next(iter(encoder.adapter.values()))[0].shape[1]
    tokens = IdentityTokens(torch.randn(1, 16, width), torch.randn(1, 16, width))
    identity = Identity(tokens, torch.randn(1, 1, 4, side // 8, side // 8), fingerprint(encoder.resampler))
    with torch.inference_mode():
        found = lookahead_step.measure(comfy, checkpoint, encoder, identity, side, rounds)
    return [
        f"| {mode} | {one['ours_rows']}, {one['ours_vae']} VAE | {one['authors_rows']}, {one['authors_vae']} VAE | "
        f"{one['pair'].ours * 1e3:.1f} ms | {one['pair'].theirs * 1e3:.1f} ms | **{one['pair'].ratio:.2f}** "
        f"({one['pair'].spread[0]:.2f}–{one['pair'].spread[1]:.2f}) | {one['largest_difference']:.1e} |"
        for mode, one in found.items()
    ]


def lookahead_at_full_size(host: Path, base: Path) -> list[str]:
    """Table rows: TFLOP of a step at SDXL's true size."""
    import lookahead_step

    with torch.inference_mode():
        work = lookahead_step.full_size_work(in_process(host, base))
    rows = []
    for mode, name in lookahead_step.MODES.items():
        theirs = work[f"authors' {name}"] + VAE_ENCODING
        rows.append(f"| {mode} | {work[name]:.1f} | {theirs:.1f} | **{theirs / work[name]:.2f}** |")
    return [*rows, f"| plain guidance | {work['plain']:.1f} | – | – |"]


def lookahead_training(checkpoint: Path, side: int, rounds: int) -> list[str]:
    """Table row: our iteration of a face encoder's training against the authors' with four UNets."""
    import lookahead_training as job

    pair, work = job.measure(checkpoint, side, rounds)
    memory = {which: peak_memory("lookahead_training", which, str(checkpoint), side) for which in job.JOBS}
    return [
        f"| {work['ours']} | {work['authors']} | {pair.ours * 1e3:.0f} ms | {pair.theirs * 1e3:.0f} ms | "
        f"**{pair.ratio:.2f}** ({pair.spread[0]:.2f}–{pair.spread[1]:.2f}) | {memory['ours']:.0f} MiB | "
        f"{memory['authors']:.0f} MiB | **{memory['ours'] / memory['authors']:.2f}** |"
    ]


def lookahead_training_at_full_size(folder: Path, batches: tuple[int, ...]) -> list[str]:
    """Table: memory of a face encoder's training at SDXL's true size, term by term."""
    import full_size_training as job

    folder.mkdir()
    checkpoint = write_checkpoint(folder, True)
    head = [f"| term | {' | '.join(f'batch {batch}' for batch in batches)} |", "| --- |" + " --- |" * len(batches)]
    return [*head, *job.rows_of([job.measure(checkpoint, batch) for batch in batches])]


def perfusion(checkpoint: Path, host: Path, base: Path, side: int, rounds: int) -> list[str]:
    """Table rows: a step with concepts against the plain model's."""
    import perfusion_step

    comfy, make_concept = in_process(host, base), helper("host/concepts.py").make_concept
    with torch.inference_mode():
        found = perfusion_step.measure(comfy, checkpoint, make_concept, (1, 2, 4), side, rounds)
    return [
        f"| {count} | {one.rows} | {one.plain_rows} | {one.pair.ours * 1e3:.1f} ms | {one.pair.theirs * 1e3:.1f} ms | "
        f"**{1 / one.pair.ratio:.3f}** ({1 / one.pair.spread[1]:.3f}–{1 / one.pair.spread[0]:.3f}) | {one.hooks:.1%} |"
        for count, one in found.items()
    ]


def perfusion_at_full_size(folder: Path, host: Path, quick: bool, rounds: int) -> list[str]:
    """The same table for SD1.5 at its true size; nothing in a quick run, which has no room for two such models."""
    if quick:
        return []
    checkpoint = write_hollow(folder / "sd15.safetensors", "sd15")
    return [
        "",
        "A hook costs about the same whatever the size of the model, so a tiny one shows the most of it. The same with "
        f"SD1.5 at its true size, 128 × 128, over {rounds // 2} pairs:",
        "",
        PERFUSION_HEAD,
        "| --- | --- | --- | --- | --- | --- | --- |",
        *perfusion(checkpoint, host, folder / "in-process", 128, rounds // 2),
    ]


def perfusion_training(checkpoint: Path, side: int, rounds: int) -> list[str]:
    """Table row: our Perfusion step against the authors' order of work."""
    import perfusion_training as job
    from pairs import time_pairs

    ours, theirs = job.Ours(checkpoint, side), job.Authors(checkpoint, side)
    work = []
    for one in (ours, theirs):
        one.step()
        c = one.counter.counts
        work.append(f"{c['unet_rows']} rows, {c['text_passes']} text passes, {c['vae_pictures']} VAE")
    pair = time_pairs(ours.step, theirs.step, rounds)
    return [
        f"| {work[0]} | {work[1]} | {pair.ours * 1e3:.0f} ms | {pair.theirs * 1e3:.0f} ms | **{pair.ratio:.2f}** "
        f"({pair.spread[0]:.2f}–{pair.spread[1]:.2f}) |"
    ]


def perfusion_files(folder: Path) -> list[str]:
    """Table rows: the size of a concept's file at the models' true sizes."""
    import perfusion_training as job

    found = job.full_size_files(helper("tiny/checkpoints.py"), helper("tiny/full_size.py"), folder)
    return [
        f"| {family} | {' | '.join(f'{size / 1000:,.1f}' for size in sizes.values())} |"
        for family, sizes in found.items()
    ]


def import_time(host: Path, base: Path, starts: int) -> str:
    """The host's own "Import times" line for the extension, over several starts."""
    server, seconds = helper("host/server.py"), []
    for number in range(starts):
        with server.Server(host, base / f"start{number}") as running:
            line = re.search(r"([\d.]+) seconds: \S*comfyui-personalize\b", running.log())
            seconds.append(float(line.group(1)))
    return ", ".join(f"{value:.1f} s" for value in seconds)


def machine(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true", help="SDXL's true size, 1024 x 1024; needs a GPU")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written: only shows that it runs")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of runs; fewer for a quick page (default: 40)")
    arguments = parser.parse_args()
    helper("host/boot.py").declare_missing_torchvision_operators()
    device, full = torch.device(arguments.device), arguments.full_size
    rounds, side = 3 if arguments.quick else arguments.rounds, 1024 if full else 64
    host = helper("tiny/find_host.py").find_comfyui()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder, full)
        size = (
            "SDXL at its true size, 1024 × 1024, bf16, gradient checkpointing"
            if full
            else "tiny SDXL-like model, 64 × 64"
        )
        page = [
            f"## {size}",
            "",
            f"{date.today().isoformat()}, {machine(device)}. Ratios are medians over {rounds} pairs of runs in turn, "
            "in one process; in brackets their range without the outer tenths.",
            "",
            "### DCO training step, batch 1",
            "",
            "| job | work per step, ours | work per step, authors' | ours | authors' | speed ratio "
            "| peak memory, ours | authors' | memory ratio |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *dco_step(checkpoint, device, side, rounds, full),
        ]
        if host is not None and not full:
            page += [
                "",
                "### Reward guidance, one denoising step, batch 1",
                "",
                "| rows per UNet call, ours | authors' | ours | authors' | speed ratio | largest difference |",
                "| --- | --- | --- | --- | --- | --- |",
                *guidance(checkpoint, host, folder / "in-process", side * 2, rounds * 2),
                "",
                "### Face encoder, one denoising step, batch 1",
                "",
                "| mode | rows per UNet call, ours | authors' | ours | authors' | speed ratio | largest difference |",
                "| --- | --- | --- | --- | --- | --- | --- |",
                *lookahead(checkpoint, host, folder / "in-process", side * 2, rounds * 2),
                "",
                "At SDXL's true size and 1024 × 1024, in TFLOP per step, counted without data:",
                "",
                "| mode | ours | authors' | ratio |",
                "| --- | --- | --- | --- |",
                *lookahead_at_full_size(host, folder / "in-process"),
                "",
                "One UNet is resident where the authors have two.",
                "",
                "### Face encoder training, one iteration of two steps, batch 2",
                "",
                "| work per iteration, ours | authors' | ours | authors' | speed ratio "
                "| peak memory, ours | authors' | memory ratio |",
                "| --- | --- | --- | --- | --- | --- | --- | --- |",
                *lookahead_training(checkpoint, side, rounds),
                "",
                "Memory at SDXL's true size, 1024 × 1024, in bf16 with gradient checkpointing and the loss `identity`, "
                "in GB of 10⁹ bytes. Weights are counted without data; moments are what is alive at most in a forward "
                "and a backward pass without data, recomputed blocks and gradients included:",
                "",
                *lookahead_training_at_full_size(folder / "full-size", (1,) if arguments.quick else (1, 4)),
                "",
                "### Perfusion concepts, one denoising step, batch 1",
                "",
                PERFUSION_HEAD,
                "| --- | --- | --- | --- | --- | --- | --- |",
                *perfusion(checkpoint, host, folder / "in-process", side * 2, rounds * 2),
                *perfusion_at_full_size(folder, host, arguments.quick, rounds),
                "",
                "### Perfusion training step, batch 4",
                "",
                "| work per step, ours | work per step, authors' | ours | authors' | speed ratio |",
                "| --- | --- | --- | --- | --- |",
                *perfusion_training(checkpoint, side, rounds),
                "",
                "A concept's file at the models' true sizes, in thousands of bytes; the authors' holds keys and values "
                "of 77 positions and C⁻¹:",
                "",
                "| family | one output per layer, fp16 | the same in fp32 | one per position, fp16 | authors' |",
                "| --- | --- | --- | --- | --- |",
                *perfusion_files(folder),
                "",
                "### Starting ComfyUI",
                "",
                "The host's own *Import times* line for the extension, one value per start: "
                f"{import_time(host, folder, 1 if arguments.quick else 3)}.",
            ]
    text = "\n".join(page) + "\n"
    print(text)
    if not arguments.quick:
        keep_section(HERE / "RESULTS.md", text)


def keep_section(path: Path, section: str) -> None:
    """Replace the page's section of the same heading, or add it."""
    heading = section.splitlines()[0]
    sections = re.split(r"(?m)^(?=## )", path.read_text(encoding="utf-8"))
    kept = [part.rstrip() + "\n" for part in sections if not part.startswith(heading)]
    path.write_text("\n".join([*kept, section]), encoding="utf-8")


if __name__ == "__main__":
    main()
