"""The small world's identity network: who a person is, whatever the pose, place and style.

It stands where a face recognition network (ArcFace) stands beside a real model: pictures of one person lie close
together, those of others apart, also for people that it was never trained on.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from dataset import draw_bytes, in_unit_range
from generator import placed_alone, random_identity
from safetensors import safe_open
from safetensors.torch import save_file
from scenes import BACKGROUNDS, EYES, HAIR, HAIR_COLOURS, SKINS, STYLES, Identity, Person, Scene
from scorer import degraded, load_autoencoder, mixed, reconstructions
from subjects import HELD_OUT_FACES, PEOPLE
from torch import Tensor, nn
from training import Plan, device, fit, in_processes, rank, world_size

FILE = "world_identity.safetensors"
DIM = 64
WIDTHS = (16, 32, 64, 96)
"""Channels at 1/2, 1/4, 1/8 and 1/16 of the resolution."""

SEED = 5
IDENTITIES = 1600
PORTRAITS = 8
"""Of each identity."""
PLAN = Plan(steps=800, batch=128, lr=2e-3, flat=0.4, ema=0.995, seed=SEED)
MARGIN = 0.2
SCALE = 20.0
SHIFT = 4.0
ZOOM = 0.1


# The network


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class IdentityNet(nn.Module):
    """Pictures of people to unit vectors; the scalar product of two says how alike the people are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2)
        stages = []
        for narrow, wide in zip(WIDTHS, (*WIDTHS[1:], None)):
            stages.append(_Residual(narrow))
            if wide is not None:
                stages.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.stages = nn.Sequential(*stages, nn.GroupNorm(8, WIDTHS[-1]), nn.SiLU())
        self.project = nn.Linear(WIDTHS[-1] * 4 * 4, DIM)
        self.threshold = 0.5
        """Similarity above which two pictures are taken to show one person; measured when the net was trained."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """In float32 and evaluation mode, for use as a measure: its weights ask for no gradient."""
        net = cls()
        with safe_open(path, framework="pt") as file:
            net.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
            net.threshold = json.loads(file.metadata()["scores"])["threshold"]
        return net.eval().requires_grad_(False)

    def save(self, path: Path, scores: dict[str, float]) -> None:
        """As float16, with the measured scores, the threshold among them, in the file's metadata."""
        tensors = {name: weight.half().contiguous() for name, weight in self.state_dict().items()}
        save_file(tensors, path.with_suffix(".partial"), {"format": "pt", "scores": json.dumps(scores)})
        os.replace(path.with_suffix(".partial"), path)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.stages(self.conv_in(2 * pictures - 1))
        return F.normalize(self.project(features.flatten(1)), dim=1)

    def embed(self, pictures: Tensor) -> Tensor:
        """Unit vectors (n, 64) of pictures (n, 3, 64, 64) in 0..1; differentiable in the pictures."""
        return self(pictures)


# Pictures of people


def portrait(rng: random.Random, who: Identity) -> Scene:
    """One person in some pose, at some place, before some background, in some style."""
    person = placed_alone(rng, Person(who, turn=rng.uniform(-1, 1)))
    return Scene(rng.choice(list(BACKGROUNDS)), (person,), rng.choices(STYLES, weights=(48, 13, 13, 13, 13))[0])


def people_scenes(name: str, count: int, seed: int) -> list[Scene]:
    """Pictures of one of the held-out people over pose, background and style.

    Raises:
        KeyError: nobody has this name.
    """
    who = PEOPLE[name]
    return [portrait(random.Random(f"{name}/{seed}/{number}"), who) for number in range(count)]


def relative(rng: random.Random, who: Identity) -> Identity:
    """Somebody who differs in one trait that can be seen, and is none of the held-out people."""
    while True:
        trait, values = rng.choice(
            (
                ("skin", range(len(SKINS))),
                ("hair", HAIR),
                ("hair_colour", HAIR_COLOURS),
                ("eyes", EYES),
                ("glasses", (False, True)),
                ("beard", (False, True)),
            )
        )
        other = replace(who, **{trait: rng.choice([value for value in values if value != getattr(who, trait)])})
        unseen = trait == "hair_colour" and who.hair == "no" and not who.beard
        if not unseen and (other.skin, other.hair, other.hair_colour) not in HELD_OUT_FACES:
            return other


def identities(name: str, count: int) -> list[Identity]:
    """Random people, every second one a relative of the one before: the hard ones to tell apart."""
    people: list[Identity] = []
    for number in range(count):
        rng = random.Random(f"{name}/{number}")
        people.append(relative(rng, people[-1]) if number % 2 else random_identity(rng))
    return people


def portraits(name: str, people: list[Identity], each: int) -> Tensor:
    """Pictures (people * each, 3, 64, 64) as bytes, those of one person next to one another."""
    rngs = {number: random.Random(f"{name}/portraits/{number}") for number in range(len(people))}
    return torch.stack([draw_bytes(portrait(rngs[n], who)) for n, who in enumerate(people) for _ in range(each)])


def moved(pictures: Tensor, generator: torch.Generator, pixels: float = SHIFT, zoom: float = ZOOM) -> Tensor:
    """Pictures (batch, channels, height, width), each shifted and scaled at random, its edges drawn out.

    Args:
        pixels: largest shift to each side.
        zoom: largest relative change of size.
    """
    count, _, height, width = pictures.shape
    scale = 1 + zoom * (2 * torch.rand(count, generator=generator) - 1)
    shift = pixels * (2 * torch.rand(count, 2, generator=generator) - 1)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = shift * 2 / torch.tensor([width, height])
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


# Training


class _Classifier(nn.Module):
    """The network and a direction for each of the people that it is trained on."""

    def __init__(self, people: int):
        super().__init__()
        self.net = IdentityNet()
        self.person_embedding = nn.Parameter(torch.randn(people, DIM) / DIM**0.5)


def margin_loss(embeddings: Tensor, directions: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of cosines from which the right one's has a margin taken off (CosFace).

    Args:
        embeddings: unit vectors (batch, dim).
        directions: (people, dim).
        labels: (batch,).
    """
    cosines = embeddings @ F.normalize(directions, dim=1).T
    return F.cross_entropy(SCALE * (cosines - MARGIN * F.one_hot(labels, len(directions))), labels)


def train_identity(work: Path, processes: int) -> None:
    """Train the network on people of random identities and write ``work / FILE``.

    The autoencoder in ``work``, finished or not, shows it what pictures look like that a model made; without one it
    is trained on drawings alone.
    """
    in_processes(processes, work, _train_identity, work)


def _train_identity(work: Path, plan: Plan = PLAN, people: int = IDENTITIES, unseen: int = 200) -> None:
    drawn, labels = _own_share(work, people)
    rebuilt = drawn.clone()
    rebuilt[::2] = reconstructions(load_autoencoder(work), drawn[::2], seed=rank())
    torch.manual_seed(SEED)
    model = _Classifier(people)

    def loss_of(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawn), (count,), generator=generator)
        pictures = moved(mixed(drawn[chosen], rebuilt[chosen], generator), generator)
        embeddings = model.net.embed(degraded(pictures, generator).to(device()))
        return margin_loss(embeddings, model.person_embedding, labels[chosen].to(device()))

    fit("identity", model, plan, loss_of, work, lambda step: _written(measure(model.net, 40)), look_every=200)
    if rank() == 0:
        net = model.net
        net.half().float()  # the scores are those of what the file holds
        scores = measure(net, unseen)
        print(f"identity: {_written(scores)}", flush=True)
        net.save(work / FILE, scores)


def _own_share(work: Path, people: int) -> tuple[Tensor, Tensor]:
    """This process's part of the portraits and whom they show, kept in a file for the next start."""
    path = work / f"portraits_{people}_{rank() + 1}_of_{world_size()}.pt"
    mine = torch.arange(rank(), people, world_size())
    if not path.exists():
        everybody = identities("identity", people)
        pictures = portraits(f"identity/{rank()}", [everybody[number] for number in mine], PORTRAITS)
        torch.save(pictures, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    return torch.load(path, weights_only=True), mine.repeat_interleave(PORTRAITS)


def _written(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


# Measuring


@torch.no_grad()
def measure(net: IdentityNet, people: int, each: int = 8) -> dict[str, float]:
    """How well the network tells people apart that it was not trained on.

    The threshold is chosen on other people than those that it is measured on. Accuracy is of pairs of pictures, as
    many of one person as of two.

    Args:
        people: how many, half of them relatives of the other half; even.
    """
    same, different, _ = _similarities(net, "identity/threshold", people, each)
    threshold = best_threshold(same, different)
    same, different, relatives = _similarities(net, "identity/unseen", people, each)
    held_out = torch.stack(
        [
            net.embed(
                in_unit_range(torch.stack([draw_bytes(scene) for scene in people_scenes(name, 4 * each, seed=0)]))
            )
            for name in PEOPLE
        ]
    )
    same_held_out, different_held_out = similarities(held_out)
    return {
        "threshold": threshold,
        "accuracy": accuracy(same, different, threshold),
        "accuracy, relatives": accuracy(same, relatives, threshold),
        "accuracy, held-out people": accuracy(same_held_out, different_held_out, threshold),
        "one person": same.mean().item(),
        "two people": different.mean().item(),
        "two relatives": relatives.mean().item(),
        "one held-out person": same_held_out.mean().item(),
        "two held-out people": different_held_out.mean().item(),
    }


def _similarities(net: IdentityNet, name: str, people: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs of pictures: of one person, of two people, and of two relatives."""
    embeddings = net.embed(in_unit_range(portraits(name, identities(name, people), each))).view(people, each, DIM)
    same, different = similarities(embeddings)
    relatives = embeddings[0::2] @ embeddings[1::2].mT
    return same, different, relatives.flatten()


def similarities(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit vectors (people, each, dim): of all pairs of pictures of one person, and of all pairs of two people."""
    people, each, dim = embeddings.shape
    table = embeddings.view(-1, dim) @ embeddings.view(-1, dim).T
    whose = torch.arange(people).repeat_interleave(each)
    upper = torch.ones_like(table, dtype=torch.bool).triu(1)
    one_person = whose[:, None] == whose
    return table[upper & one_person], table[upper & ~one_person]


def best_threshold(same: Tensor, different: Tensor) -> float:
    """The similarity that parts the two kinds of pairs with the fewest mistakes, both kinds counting alike."""
    candidates = torch.linspace(-1, 1, 401)
    return max(candidates.tolist(), key=lambda threshold: accuracy(same, different, threshold))


def accuracy(same: Tensor, different: Tensor, threshold: float) -> float:
    """Share of the pairs on the right side of the threshold, both kinds counting alike."""
    return ((same > threshold).float().mean() + (different <= threshold).float().mean()).item() / 2
