"""The small world's CLIP: an image tower and a text tower trained together on its pictures and captions.

One file holds the pair under the names of transformers' CLIPModel; the host's CLIP-Vision loader reads the image
half of it.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import caption, random_caption
from dataset import UNSEEN, draw_bytes, in_unit_range, load_examples, padded_ids
from generator import random_scene
from safetensors import safe_open
from safetensors.torch import save_file
from scenes import BACKGROUNDS, SHAPES, STYLES, Scene, Shape, colours_on
from scorer import degraded, load_autoencoder, mixed, reconstructions
from torch import Tensor
from training import Plan, device, fit, in_processes, rank, world_size
from transformers import CLIPConfig, CLIPModel

from comfyui_personalize.trainers.tokenizer import load_tokenizer

FILE = "world_clip.safetensors"
VISION_SIZES = Path(__file__).resolve().parents[1] / "tiny" / "clip_vision.json"
"""In the form of the host's own configurations; the test-only node folder registers the image tower from it."""
START, END = 49406, 49407
TEXT_SIZES = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 64,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures; every CLIP reader, the host too, normalizes with them."""

SEED = 4
PLAN = Plan(steps=800, batch=256, lr=2e-3, flat=0.5, ema=0.995, seed=SEED)
REBUILT = 8000
"""How many of the pictures are shown, half the time, as the autoencoder returns them."""
LARGEST_LOGIT_SCALE = math.log(100)
AMONG = 64


# The model and its file


def build_pair() -> CLIPModel:
    """The pair with the usual random start of its classes, from torch's global generator."""
    vision = json.loads(VISION_SIZES.read_text())
    return CLIPModel(CLIPConfig(text_config=TEXT_SIZES, vision_config=vision, projection_dim=vision["projection_dim"]))


def write_pair(path: Path, model: CLIPModel, scores: dict[str, float]) -> None:
    """Write both towers as float16, with their sizes and scores in the file's metadata."""
    tensors = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(_sizes(model)), "scores": json.dumps(scores)}
    save_file(tensors, path.with_suffix(".partial"), metadata)
    os.replace(path.with_suffix(".partial"), path)


def _sizes(model: CLIPModel) -> dict:
    vision = {name: getattr(model.config.vision_config, name) for name in json.loads(VISION_SIZES.read_text())}
    text = {name: getattr(model.config.text_config, name) for name in TEXT_SIZES}
    return {"text_config": text, "vision_config": vision, "projection_dim": model.config.projection_dim}


def load_pair(path: Path) -> tuple[CLIPModel, Callable[[Tensor], Tensor]]:
    """The pair in float32 and evaluation mode, and the function that makes pictures ready for it."""
    with safe_open(path, framework="pt") as file:
        config = CLIPConfig(**json.loads(file.metadata()["config"]))
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - it is no dict
    model = CLIPModel(config)
    model.load_state_dict(weights)
    return model.eval(), partial(preprocess, side=config.vision_config.image_size)


def preprocess(pictures: Tensor, side: int = 64) -> Tensor:
    """Pictures (n, 3, height, width) in 0..1 as a CLIP image tower wants them, (n, 3, side, side); differentiable.

    Other sizes are scaled until the shorter side fits, and cropped in the middle, as the host does it.
    """
    height, width = pictures.shape[-2:]
    if (height, width) != (side, side):
        factor = side / min(height, width)
        size = round(height * factor), round(width * factor)
        pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pictures = pictures[..., top : top + side, left : left + side].clamp(0, 1)
    mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures - mean) / std


def embed_pictures(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit vectors (n, 64) of preprocessed pictures (n, 3, 64, 64)."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def embed_texts(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit vectors (n, 64) of captions' ids (n, 77), padded with the end token."""
    # What stands behind the longest caption cannot be seen through the causal mask: it only costs time.
    longest = int((ids != END).sum(1).max()) + 1
    return F.normalize(model.text_projection(model.text_model(input_ids=ids[:, :longest]).pooler_output), dim=-1)


# Training


def contrastive_loss(pictures: Tensor, texts: Tensor, log_scale: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of finding each picture's caption and each caption's picture in the batch (CLIP).

    Args:
        pictures, texts: unit vectors, (batch, dim).
        same: (batch, batch), whether two captions are the same; then either of their pictures is right.
    """
    logits = log_scale.clamp(max=LARGEST_LOGIT_SCALE).exp() * pictures @ texts.T
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(work: Path, processes: int) -> None:
    """Train the pair on the drawn examples and write ``work / FILE``.

    The autoencoder in ``work``, finished or not, shows it what pictures look like that a model made; without one it
    is trained on drawings alone.
    """
    in_processes(processes, work, _train_clip, work)


def _train_clip(work: Path, plan: Plan = PLAN, rebuilt: int = REBUILT) -> None:
    torch.manual_seed(SEED)
    examples = load_examples(work)
    count_seen = len(examples) - UNSEEN
    # Each process shows other pictures as the autoencoder returns them.
    first = rank() * rebuilt // world_size()
    shown = slice(first, first + rebuilt // world_size())
    pictures_rebuilt = reconstructions(load_autoencoder(work), examples.pictures[shown], seed=rank())
    model = build_pair()

    def loss_of(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(count_seen, (count,), generator=generator)
        drawn = examples.pictures[chosen]
        seen = drawn.clone()
        inside = (chosen >= shown.start) & (chosen < shown.stop)
        seen[inside] = pictures_rebuilt[chosen[inside] - shown.start]
        pixels = degraded(mixed(drawn, seen, generator), generator)
        which = torch.randint(examples.ids.shape[1], (count,), generator=generator)
        ids = examples.ids[chosen, which].long()
        same = (ids[:, None] == ids[None]).all(-1).float()
        image, text = embed_pictures(model, preprocess(pixels).to(device())), embed_texts(model, ids.to(device()))
        return contrastive_loss(image, text, model.logit_scale, same.to(device()))

    tokenizer = load_tokenizer()
    fit("clip", model, plan, loss_of, work, lambda step: _written(measure(model, tokenizer, 256)), look_every=200)
    if rank() == 0:
        model.half().float()  # the scores are those of what the file holds
        scores = measure(model, tokenizer)
        print(f"clip: {_written(scores)}", flush=True)
        write_pair(work / FILE, model, scores)


def _written(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


# Measuring


@torch.no_grad()
def measure(model: CLIPModel, tokenizer, count: int = 1024) -> dict[str, float]:
    """Scores in 0..1 on ``count`` scenes that no example shows.

    Retrieval is of the one right picture or caption among 64. The others are how often a picture's caption fits
    it better than the caption of a scene in which one thing is different.
    """
    rngs = [random.Random(f"clip/{number}") for number in range(count)]
    scenes = [random_scene(rng) for rng in rngs]
    image = embed_pictures(model, preprocess(in_unit_range(torch.stack([draw_bytes(scene) for scene in scenes]))))

    def read(words: Sequence[str]) -> Tensor:
        return embed_texts(model, torch.tensor([padded_ids(tokenizer, one) for one in words]))

    text = read([caption(scene) for scene in scenes])
    loose = read([random_caption(rng, scene) for rng, scene in zip(rngs, scenes)])
    scores = {
        "text to picture": _found(text, image),
        "picture to text": _found(image, text),
        "text to picture, captions of every length": _found(loose, image),
        "picture to text, captions of every length": _found(image, loose),
    }
    right = (image * text).sum(1)
    changed = [one_thing_changed(rng, scene) for rng, scene in zip(rngs, scenes)]
    for name in ("background", "style", "place", "shape", "colour", "exchanged colours"):
        rows = [row for row, others in enumerate(changed) if name in others]
        wrong = read([caption(changed[row][name]) for row in rows])
        scores[name] = (right[rows] > (image[rows] * wrong).sum(1)).float().mean().item()
    return scores


def _found(queries: Tensor, answers: Tensor) -> float:
    """How often the nearest of each 64 answers is the query's own."""
    right = [
        (some @ others.T).argmax(1) == torch.arange(len(some))
        for some, others in zip(queries.split(AMONG), answers.split(AMONG))
    ]
    return torch.cat(right).float().mean().item()


def one_thing_changed(rng: random.Random, scene: Scene) -> dict[str, Scene]:
    """What is changed -> the scene with that alone different, as far as its kind allows."""
    first, *others = scene.things
    changed = {
        "background": replace(scene, background=_other(rng, BACKGROUNDS, scene.background)),
        "style": replace(scene, style=_other(rng, STYLES, scene.style)),
    }
    if not others:
        x = first.x + (22 if first.x < 32 else -22)
        changed["place"] = replace(scene, things=(replace(first, x=x),))
    if isinstance(first, Shape):
        colour = _other(rng, colours_on(scene.background), first.colour)
        changed["colour"] = replace(scene, things=(replace(first, colour=colour), *others))
        changed["shape"] = replace(scene, things=(replace(first, shape=_other(rng, SHAPES, first.shape)), *others))
    if others and first.colour != others[0].colour:
        exchanged = replace(first, colour=others[0].colour), replace(others[0], colour=first.colour)
        changed["exchanged colours"] = replace(scene, things=exchanged)
    return changed


def _other(rng: random.Random, words: Sequence[str], word: str) -> str:
    return rng.choice([other for other in words if other != word])
