"""Training data of the small world: pictures drawn once, each with several captions as CLIP token ids."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import random_caption
from drawing import draw, mask_of
from generator import random_scene
from scenes import SIDE, Scene
from torch import Tensor

from comfyui_personalize.models.families import EncoderSlot
from comfyui_personalize.trainers.tokenizer import load_tokenizer

LENGTH = 77
SEED = 1
EXAMPLES = 24000
UNSEEN = 200
"""Examples at the end of the list that nothing is trained on."""
CAPTIONS = 4
RARE_WORDS = 0.04
"""Share of captions in which a random token stands somewhere, so that rare words' rows are trained a little."""


@dataclass(frozen=True)
class Sizes:
    """SDXL's size conditioning of one picture, in pixels."""

    original: tuple[int, int] = (SIDE, SIDE)
    crop: tuple[int, int] = (0, 0)

    def numbers(self) -> list[int]:
        return [*self.original, *self.crop, SIDE, SIDE]


def draw_bytes(scene: Scene) -> Tensor:
    """The scene as (3, 64, 64) bytes."""
    return torch.from_numpy(np.rint(draw(scene) * 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def object_mask(scene: Scene) -> Tensor:
    """Where the scene's things are, (1, 64, 64) bytes."""
    mask = np.max([mask_of(thing) for thing in scene.things], axis=0)
    return torch.from_numpy(np.rint(mask * 255).astype(np.uint8))[None]


def resized(rng: random.Random, picture: Tensor) -> tuple[Tensor, Sizes]:
    """Now and then a picture that was small before, or a crop of a larger one, with the sizes that say so."""
    chance = rng.random()
    pixels = picture[None].float()
    if chance < 0.05:
        side = rng.choice((24, 32, 40))
        small = F.interpolate(pixels, (side, side), mode="area")
        pixels, sizes = F.interpolate(small, (SIDE, SIDE), mode="bicubic"), Sizes(original=(side, side))
    elif chance < 0.1:
        side = rng.choice((72, 80, 96))
        top, left = rng.randint(0, side - SIDE), rng.randint(0, side - SIDE)
        large = F.interpolate(pixels, (side, side), mode="bicubic")
        pixels, sizes = large[..., top : top + SIDE, left : left + SIDE], Sizes((side, side), (top, left))
    else:
        return picture, Sizes()
    return pixels[0].round().clamp(0, 255).to(torch.uint8), sizes


def padded_ids(tokenizer, words: str, rng: random.Random | None = None) -> list[int]:
    """A caption's 77 ids, padded with the end token; with ``rng`` a rare word may be slipped in."""
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    if rng is not None and rng.random() < RARE_WORDS:
        ids.insert(rng.randint(0, len(ids)), rng.randrange(256, tokenizer.bos_token_id))
    ids = [tokenizer.bos_token_id, *ids[: LENGTH - 2], tokenizer.eos_token_id]
    return ids + [tokenizer.eos_token_id] * (LENGTH - len(ids))


def for_encoder(ids: Tensor, slot: EncoderSlot) -> Tensor:
    """Ids (batch, 77) padded with the end token, as one encoder wants them padded."""
    if slot.pad_with_end:
        return ids
    end = ids.max()
    after = (ids == end).cumsum(1) > 1
    return ids.masked_fill(after, 0)


@dataclass(frozen=True)
class Examples:
    """Drawn pictures with what belongs to them."""

    pictures: Tensor
    """(n, 3, 64, 64) bytes."""
    masks: Tensor
    """(n, 1, 64, 64) bytes."""
    ids: Tensor
    """(n, captions, 77) int32."""
    sizes: Tensor
    """(n, 6) as SDXL's conditioning has them."""

    def __len__(self) -> int:
        return len(self.pictures)


def make_examples(count: int, seed: int, tokenizer) -> Examples:
    """Draw ``count`` scenes; the same seed gives the same examples, and a longer list begins like a shorter one."""
    pictures, masks, ids, sizes = [], [], [], []
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        scene = random_scene(rng)
        picture, conditioning = resized(rng, draw_bytes(scene))
        pictures.append(picture)
        masks.append(object_mask(scene))
        ids.append([padded_ids(tokenizer, random_caption(rng, scene), rng) for _ in range(CAPTIONS)])
        sizes.append(conditioning.numbers())
    return Examples(
        torch.stack(pictures), torch.stack(masks), torch.tensor(ids, dtype=torch.int32), torch.tensor(sizes)
    )


def draw_examples(work: Path) -> None:
    """Draw the examples that everything is trained on into ``work``, once."""
    path = work / "examples.pt"
    if not path.exists():
        torch.save(vars(make_examples(EXAMPLES, SEED, load_tokenizer())), path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)


def load_examples(work: Path) -> Examples:
    return Examples(**torch.load(work / "examples.pt", weights_only=True, mmap=True))


def in_unit_range(pictures: Tensor, indices: Sequence[int] | Tensor = slice(None)) -> Tensor:
    """Bytes to floats in 0..1."""
    return pictures[indices].float() / 255
