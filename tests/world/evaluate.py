"""How well a checkpoint draws what captions say: python tests/world/evaluate.py --checkpoint world_sdxl.safetensors

Pictures of captions that training never had are sampled in ComfyUI, with its own loader, text encoder, sampler
and decoder, and read by the scorer. Each share stands beside the scorer's on the drawn pictures themselves and on
drawn pictures that went through the checkpoint's autoencoder.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent / "host", HERE.parent / "tiny")]

import boot  # noqa: E402 - lies in a folder that was just added

boot.declare_missing_torchvision_operators()

import dataset  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from autoencoder import psnr  # noqa: E402
from captions import caption  # noqa: E402
from dataset import draw_bytes, in_unit_range  # noqa: E402
from diffusion import CFG, in_batches  # noqa: E402
from find_host import find_comfyui  # noqa: E402
from generator import random_scene  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from scenes import SIDE, Creature, Scene  # noqa: E402
from scorer import Reading, Scorer, ScorerError, compare  # noqa: E402
from torch import Tensor  # noqa: E402
from weights import WeightsError, evaluation_table  # noqa: E402

SEED = 9
SAMPLER, SCHEDULER, STEPS = "euler", "normal", 20
BATCH = 50
"""Pictures that are sampled together; no picture depends on it."""
ROWS = (
    # captions of, kinds of scenes, what must be right
    ("one or two shapes", ("shape", "pair"), ("background", "style")),
    ("one shape", ("shape",), ("place", "shape", "colour", "shape and colour")),
    ("two shapes", ("pair",), ("both right",)),
    ("a creature", ("creature",), ("background", "place", "colour", "parts")),
    ("a person", ("person",), ("background", "place", "shape")),
)


class NoHostError(RuntimeError):
    """There is no ComfyUI to sample with."""


# What to draw


def unseen_scenes(kind: str, count: int, seed: int = SEED) -> list[Scene]:
    """Scenes whose comprehensive caption fits no scene of the training data.

    Styles and textures stay as frequent as in training; without this most of what is left over would be striped.
    """
    seen, scenes = _training_captions(), []
    for number in range(count):
        rng = random.Random(f"{seed}/{kind}/{number}")
        wanted = scene = random_scene(rng, kind)
        while caption(scene) in seen or _textures(scene) != _textures(wanted):
            scene = random_scene(rng, kind, wanted.style)
        scenes.append(scene)
    return scenes


@cache
def _training_captions() -> frozenset[str]:
    return frozenset(
        caption(random_scene(random.Random(f"{dataset.SEED}/{number}"))) for number in range(dataset.EXAMPLES)
    )


def _textures(scene: Scene) -> list[str]:
    return [getattr(thing, "texture", "") for thing in scene.things]


def drawn(scenes: Sequence[Scene]) -> Tensor:
    """Pictures of scenes, (n, 3, 64, 64) in 0..1."""
    return in_unit_range(torch.stack([draw_bytes(scene) for scene in scenes]))


# The host


class HostModel:
    """A checkpoint in ComfyUI: its own nodes, called in this process."""

    def __init__(self, host: SimpleNamespace, checkpoint: Path):
        host.folder_paths.add_model_folder_path("checkpoints", str(checkpoint.resolve().parent), is_default=True)
        self.nodes = host.nodes
        with torch.inference_mode():
            self.model, self.clip, self.vae = self.nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint.name)[:3]

    def sample(self, captions: Sequence[str], cfg: float = CFG, *, steps: int = STEPS, seed: int = SEED) -> Tensor:
        """Pictures (n, 3, 64, 64) in 0..1; picture i depends on its caption, its number and the seed alone."""
        with torch.inference_mode():
            pieces = [
                self._sample(captions[chosen], range(len(captions))[chosen], cfg, steps, seed)
                for chosen in in_batches(len(captions), BATCH)
            ]
        return torch.cat(pieces)

    def _sample(self, captions: Sequence[str], numbers: range, cfg: float, steps: int, seed: int) -> Tensor:
        (latent,) = self.nodes.EmptyLatentImage().generate(SIDE, SIDE, len(captions))
        latent["batch_index"] = list(numbers)  # the noise of each
        positive, negative = self._stacked(captions), self._stacked([""])
        arguments = (seed, steps, cfg, SAMPLER, SCHEDULER, positive, negative, latent)
        (sampled,) = self.nodes.KSampler().sample(self.model, *arguments)
        return self._decode(sampled)

    def _stacked(self, captions: Sequence[str]) -> list:
        """One conditioning with a row for each caption; they are all of one length."""
        encoded = [self.nodes.CLIPTextEncode().encode(self.clip, words)[0][0] for words in captions]
        extra = dict(encoded[0][1])
        if extra.get("pooled_output") is not None:
            extra["pooled_output"] = torch.cat([other["pooled_output"] for _, other in encoded])
        return [[torch.cat([embeds for embeds, _ in encoded]), extra]]

    def through_autoencoder(self, pictures: Tensor) -> Tensor:
        """The pictures encoded and decoded, (n, 3, 64, 64) in 0..1."""
        with torch.inference_mode():
            return torch.cat(
                [
                    self._decode(self.nodes.VAEEncode().encode(self.vae, pictures[chosen].movedim(1, -1))[0])
                    for chosen in in_batches(len(pictures), BATCH)
                ]
            )

    def _decode(self, latent: Mapping) -> Tensor:
        return self.nodes.VAEDecode().decode(self.vae, latent)[0].movedim(-1, 1).float().clamp(0, 1)


@cache
def import_host() -> SimpleNamespace:
    """The host in this process, with folders of its own that are removed at the end.

    Raises:
        NoHostError: no ComfyUI was found.
    """
    try:
        comfyui = find_comfyui()
    except FileNotFoundError as error:
        raise NoHostError(str(error)) from error
    if comfyui is None:
        raise NoHostError("no ComfyUI found to sample with; set COMFYUI_PATH to a ComfyUI checkout")
    import in_process

    folder = tempfile.TemporaryDirectory(prefix="world-evaluation-")
    host = in_process.import_host(comfyui, Path(folder.name))
    host.own_folder = folder  # lives as long as the host
    import comfy.utils
    import tinymodels  # noqa: F401 - registers the world's models

    comfy.utils.set_progress_bar_enabled(False)
    return host


# The numbers


def evaluate(
    checkpoint: Path,
    *,
    count: int = 500,
    cfg: float = CFG,
    scorer: Scorer | None = None,
    sheet: Path | None = None,
    host: SimpleNamespace | None = None,
) -> dict:
    """Sample and score; a fifth of ``count`` more for creatures and for people each.

    Args:
        count: captions of shapes and of pairs, half of each.
        scorer: the committed one unless given.
        sheet: where to save pictures with their captions.
        host: an imported host; imported here unless given.

    Returns:
        "rows": shares right of the sampled pictures, of drawn ones and of drawn ones through the autoencoder;
        "psnr" of the autoencoder in dB; "settings".

    Raises:
        NoHostError: no ComfyUI was found.
    """
    scorer = scorer or Scorer.load()
    model = HostModel(host or import_host(), checkpoint)
    counts = {"shape": count - count // 2, "pair": count // 2, "creature": count // 5, "person": count // 5}
    scenes = {kind: unseen_scenes(kind, number) for kind, number in counts.items()}
    pictures = {kind: drawn(chosen) for kind, chosen in scenes.items()}
    made = model.sample([caption(scene) for chosen in scenes.values() for scene in chosen], cfg)
    sampled = dict(zip(scenes, made.split(list(counts.values()))))
    rebuilt = {kind: model.through_autoencoder(originals) for kind, originals in pictures.items()}

    right = {
        source: {kind: _right(scorer.read(of_kind[kind]), scenes[kind]) for kind in scenes}
        for source, of_kind in (("sampled", sampled), ("ceiling", rebuilt), ("drawn", pictures))
    }
    rows = []
    for of, kinds, keys in ROWS:
        for key in keys:
            found = {source: torch.cat([right[source][kind][key] for kind in kinds]) for source in right}
            shares = {source: round(share.mean().item(), 4) for source, share in found.items()}
            rows.append({"of": of, "right": key, "count": len(found["drawn"])} | shares)

    mixed = drawn([random_scene(random.Random(f"{SEED}/{number}")) for number in range(count)])
    if sheet is not None:
        save_sheet(sampled, scenes, sheet)
    settings = {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": STEPS, "cfg": cfg, "seed": SEED}
    return {
        "settings": settings | {"captions": count, "pictures": count},
        "rows": rows,
        "psnr": round(float(psnr(model.through_autoencoder(mixed), mixed)), 2),
    }


def _right(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What is right in each picture, key -> (n,) in 0..1; "parts" only for creatures."""
    found = {key: right.float() for key, right in compare(reading, list(scenes)).items()}
    if all(isinstance(scene.things[0], Creature) for scene in scenes):
        found["parts"] = torch.stack([reading.parts_right(scene.things[0])[i] for i, scene in enumerate(scenes)])
    return found


# Sample sheet

COLUMNS, SHEET_ROWS = 8, 6
ON_SHEET = {"shape": 16, "pair": 14, "creature": 10, "person": 8}
CELL, GAP, LINE, CAPTION_LINES = 128, 12, 14, 5
MOST_BYTES = 200_000


def save_sheet(sampled: Mapping[str, Tensor], scenes: Mapping[str, Sequence[Scene]], path: Path) -> None:
    """The first pictures of each kind, none chosen, with their captions, as a JPEG of at most MOST_BYTES."""
    entries = [
        (sampled[kind][index], caption(scenes[kind][index]))
        for kind, number in ON_SHEET.items()
        for index in range(min(number, len(scenes[kind])))
    ]
    random.Random(SEED).shuffle(entries)
    font, high = ImageFont.load_default(11), CELL + CAPTION_LINES * LINE + GAP
    rows = -(-len(entries) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, rows * high + GAP), "white")
    pen = ImageDraw.Draw(page)
    for number, (picture, words) in enumerate(entries):
        x, y = GAP + number % COLUMNS * (CELL + GAP), GAP + number // COLUMNS * high
        pixels = np.rint(picture.movedim(0, -1).numpy() * 255).astype(np.uint8)
        page.paste(Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        for index, line in enumerate(_lines(words, font)):
            pen.text((x, y + CELL + 3 + index * LINE), line, fill=(35, 38, 45), font=font)
    for quality in range(92, 40, -6):
        page.save(path, "JPEG", quality=quality, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break


def _lines(words: str, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--scorer", type=Path, help="a scorer's file; the committed one unless given")
    parser.add_argument("--count", type=int, default=500, help="captions, half of them of two shapes")
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--sheet", type=Path, help="save pictures with their captions as this JPEG")
    given = parser.parse_args()
    if not given.checkpoint.is_file():
        parser.error(f"{given.checkpoint}: no such checkpoint")
    try:
        scorer = Scorer.load(given.scorer)
        result = evaluate(given.checkpoint, count=given.count, cfg=given.cfg, scorer=scorer, sheet=given.sheet)
    except (NoHostError, ScorerError, WeightsError) as error:
        sys.exit(str(error))
    print("\n".join(evaluation_table(result)))


if __name__ == "__main__":
    main()
