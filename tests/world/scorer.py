"""What a picture of the small world shows, read by a small network that was trained on drawn scenes.

The scorer names background, style and every attribute of up to two things, each with a calibrated probability,
so that generated pictures can be compared with the scenes that were asked for. It also knows the characters,
people and styles that the base model never sees.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import NarrowAutoencoder
from dataset import draw_bytes, in_unit_range
from generator import (
    placed_alone,
    placed_as_pair,
    random_creature,
    random_identity,
    random_scene,
    random_shape,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scenes import (
    BACKGROUNDS,
    BODIES,
    COLOURS,
    HAIR,
    HAIR_COLOURS,
    HELD_OUT_STYLES,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    SKINS,
    STYLES,
    TEXTURES,
    TOPS,
    Creature,
    Identity,
    Person,
    Scene,
    Shape,
    Thing,
    contrasts,
)
from subjects import PEOPLE, SUBJECTS
from torch import Tensor, nn
from training import Plan, device, fit, in_processes, rank, world_size
from weights import path_of

FILE = "world_scorer.safetensors"
FORMAT = "world-scorer/1"

OTHER = "other"
NONE = "none"
IGNORED = -1
"""Label of an attribute that a scene does not have or does not show."""

SLOTS = ("A", "B")
"""A is the only thing or the left one, B the right one."""
PICTURE_HEADS: dict[str, tuple] = {
    "background": tuple(BACKGROUNDS),
    "style": STYLES + HELD_OUT_STYLES,
    "count": (1, 2),
    "place": tuple(PLACES),  # of a thing that is alone
    "size": tuple(SIZES),  # of a shape that is alone
}
THING_HEADS: dict[str, tuple] = {
    "what": (*SHAPES, "creature", "person", NONE),
    "colour": tuple(COLOURS),  # a creature's body's; people have none
    "texture": TEXTURES,
    "body": BODIES,
    "top": TOPS,
    "second": tuple(COLOURS),
    "eyes": (1, 2),
    "belly": (False, True),
    "odd": (NONE, *COLOURS),  # the right-hand ear's, horn's or antenna's where it is another
    "subject": (*SUBJECTS, OTHER),
    "identity": (*PEOPLE, OTHER),
}
HEADS: dict[str, tuple] = PICTURE_HEADS | {
    f"{slot}.{name}": classes for slot in SLOTS for name, classes in THING_HEADS.items()
}
PARTS = ("body", "colour", "second", "top", "eyes", "belly", "odd")
"""What makes a creature one of the held-out subjects."""
COLOUR_PARTS = ("colour", "second", "odd")


class ScorerError(ValueError):
    """The file is not a scorer that this code can read."""


# Scenes to labels


def targets_of(scene: Scene) -> dict[str, int]:
    """The class of each head that the scene decides; the other heads are absent."""
    things = scene.things
    values: dict[str, object] = {"background": scene.background, "style": scene.style, "count": len(things)}
    if len(things) == 1:
        values["place"] = min(PLACES, key=lambda place: abs(PLACES[place] - things[0].x))
        values["B.what"] = NONE
        if isinstance(things[0], Shape):
            values["size"] = things[0].size
    for slot, thing in zip(SLOTS, things):
        values |= {f"{slot}.{name}": value for name, value in _values_of(thing, scene.style).items()}
    return {name: HEADS[name].index(value) for name, value in values.items()}


def _values_of(thing: Thing, style: str) -> dict[str, object]:
    """What can be read of a thing. The held-out styles have two inks: they hide colours and, with them, who it is
    where another one of the same build would look alike."""
    inked = style in HELD_OUT_STYLES
    if isinstance(thing, Shape):
        values = {"what": thing.shape, "colour": thing.colour, "texture": thing.texture}
        hidden = {"colour"} if inked else set()
    elif isinstance(thing, Creature):
        looks = parts_of_creature(thing)
        name = next((name for name, subject in SUBJECTS.items() if parts_of_creature(subject.looks) == looks), OTHER)
        values = {"what": "creature", "subject": name} | looks
        hidden = set() if _second_shows(thing) else {"second", "odd"}
        if thing.top == "none":
            hidden.add("odd")
        if inked:
            hidden |= set(COLOUR_PARTS)
            if name == OTHER and any(_build(thing) == _build(subject.looks) for subject in SUBJECTS.values()):
                hidden.add("subject")
    else:
        who = thing.identity
        name = next((name for name, identity in PEOPLE.items() if _traits(identity) == _traits(who)), OTHER)
        values = {"what": "person", "identity": name}
        alike = any(_traits(identity)[2:] == _traits(who)[2:] for identity in PEOPLE.values())
        hidden = {"identity"} if inked and name == OTHER and alike else set()
    return {name: value for name, value in values.items() if name not in hidden}


def parts_of_creature(creature: Creature) -> dict[str, object]:
    """The attributes in PARTS; an odd colour that is the second colour, or that nothing has, is none."""
    values = {part: getattr(creature, part) for part in PARTS}
    if creature.odd in (None, creature.second) or creature.top == "none":
        values["odd"] = NONE
    return values


def _second_shows(creature: Creature) -> bool:
    """Whether something other than the antenna's ball, which may be odd, has the second colour."""
    return creature.top in ("ears", "horns") or creature.belly or creature.feet or creature.tail != "none"


def _build(creature: Creature) -> tuple:
    return creature.body, creature.top, creature.eyes, creature.belly


def _traits(who: Identity) -> tuple:
    """What tells the held-out people from others, colours first."""
    return who.skin, who.hair_colour, who.hair, who.glasses, who.beard


def target_table(scenes: list[Scene]) -> Tensor:
    """Labels (n, heads) in the order of HEADS, IGNORED where the scene does not decide."""
    targets = [targets_of(scene) for scene in scenes]
    return torch.tensor([[target.get(name, IGNORED) for name in HEADS] for target in targets])


# Reading


@dataclass(frozen=True)
class Reading:
    """What was read in n pictures."""

    probabilities: dict[str, Tensor]
    """Head -> (n, classes), calibrated; the order of classes is that of HEADS."""

    def indices(self, head: str) -> Tensor:
        """The likeliest class, (n,); meaningful only where the picture has the attribute."""
        return self.probabilities[head].argmax(1)

    def names(self, head: str) -> list:
        return [HEADS[head][index] for index in self.indices(head).tolist()]

    @property
    def background(self) -> Tensor:
        return self.indices("background")

    @property
    def style(self) -> Tensor:
        return self.indices("style")

    def probability(self, head: str, value: object) -> Tensor:
        return self.probabilities[head][:, HEADS[head].index(value)]

    def subject_probability(self, name: str) -> Tensor:
        """That one of the things is this held-out subject, (n,)."""
        return self._anywhere("creature", "subject", name)

    def identity_probability(self, name: str) -> Tensor:
        """That one of the things is this held-out person, (n,)."""
        return self._anywhere("person", "identity", name)

    def _anywhere(self, what: str, head: str, value: str) -> Tensor:
        absent = [
            1 - self.probability(f"{slot}.what", what) * self.probability(f"{slot}.{head}", value) for slot in SLOTS
        ]
        return 1 - absent[0] * absent[1]

    def parts_right(self, creature: Creature) -> Tensor:
        """Share of the creature's PARTS that were read right, (n,); 0 where no creature was read.

        Of two creatures the one that is more alike counts. Parts that the creature does not show are left out.
        The held-out styles hide colours, so pictures in them score low.
        """
        values = _values_of(creature, STYLES[0])
        shares = []
        for slot in SLOTS:
            hits = [
                self.indices(f"{slot}.{part}") == THING_HEADS[part].index(values[part])
                for part in PARTS
                if part in values
            ]
            seen = self.indices(f"{slot}.what") == THING_HEADS["what"].index("creature")
            shares.append(torch.stack(hits).float().mean(0) * seen)
        return torch.maximum(*shares)


def compare(reading: Reading, scenes: list[Scene], *, either_order: bool = False) -> dict[str, Tensor]:
    """Whether each picture shows what its scene has.

    Args:
        reading: of n pictures.
        scenes: what was asked for, n of them.
        either_order: whether two things may have changed places, as after a caption that does not say where
            they are; the order that fits better counts.

    Returns:
        key -> (n,) bool, with keys "background", "style", "count", "place" (of a thing that is alone), "shape"
        and "colour" (of all things), "shape and colour", and "both right" (two things were seen, each with its
        shape and colour). What `applies` says is not asked of a scene counts as right.

    Raises:
        ValueError: there are not as many scenes as pictures.
    """
    if len(scenes) != len(reading.background):
        raise ValueError(f"{len(scenes)} scenes for {len(reading.background)} pictures")
    hits = _hits(reading, scenes)
    if either_order:
        turned = _hits(reading, [replace(scene, things=scene.things[::-1]) for scene in scenes])
        better = _fit(turned) > _fit(hits)
        hits = {name: torch.where(better, turned[name], hits[name]) for name in hits}
    alone = torch.tensor([len(scene.things) == 1 for scene in scenes])
    shape = hits["A.what"] & (hits["B.what"] | alone)
    colour = hits["A.colour"] & hits["B.colour"]
    return {
        "background": hits["background"],
        "style": hits["style"],
        "count": hits["count"],
        "place": hits["place"],
        "shape": shape,
        "colour": colour,
        "shape and colour": shape & colour,
        "both right": alone | (hits["count"] & shape & colour),
    }


def applies(scenes: list[Scene]) -> dict[str, Tensor]:
    """For which scenes each key of `compare` asks something, key -> (n,) bool."""
    targets = [targets_of(scene) for scene in scenes]
    everywhere = torch.ones(len(scenes), dtype=torch.bool)
    coloured = torch.tensor([any(f"{slot}.colour" in target for slot in SLOTS) for target in targets])
    alone = torch.tensor([len(scene.things) == 1 for scene in scenes])
    everything = dict.fromkeys(("background", "style", "count", "shape"), everywhere)
    return everything | {"place": alone, "colour": coloured, "shape and colour": coloured, "both right": ~alone}


def _hits(reading: Reading, scenes: list[Scene]) -> dict[str, Tensor]:
    """Head -> (n,) bool; right where the scene does not decide."""
    table = target_table(scenes)
    return {
        name: (table[:, column] == IGNORED) | (reading.indices(name) == table[:, column])
        for column, name in enumerate(HEADS)
    }


def _fit(hits: dict[str, Tensor]) -> Tensor:
    return sum(hits[f"{slot}.{name}"].int() for slot in SLOTS for name in ("what", "colour"))


# The network


class ScorerNetwork(nn.Module):
    """Pictures (n, 3, 64, 64) in 0..1 to head -> logits (n, classes)."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 32, 5, stride=2, padding=2)
        self.body = nn.Sequential(
            *_after(32),
            *_layer(32, 64, 2),
            *_layer(64, 64, 1),
            *_layer(64, 96, 2),
            *_layer(96, 96, 1),
            *_layer(96, 128, 2),
            nn.Conv2d(128, 64, 1),
            *_after(64),
            nn.Conv2d(64, 192, SIDE // 16),  # sees the whole picture, so it knows left from right
            nn.ReLU(inplace=True),
        )
        self.conv_out = nn.Conv2d(192, sum(map(len, HEADS.values())), 1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        x = ((pictures - 0.5) * 4).contiguous(memory_format=torch.channels_last)
        logits = self.conv_out(self.body(self.conv_in(x))).flatten(1)
        return dict(zip(HEADS, logits.split([len(classes) for classes in HEADS.values()], dim=1)))


def _layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), *_after(outputs)]


def _after(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(8, channels), nn.ReLU(inplace=True)]


class Scorer:
    """A trained network with its calibration."""

    def __init__(self, network: ScorerNetwork, temperatures: dict[str, float], accuracies: dict | None = None):
        self.network = network.eval()
        self.temperatures = temperatures
        self.accuracies = accuracies or {}
        """Set of unseen pictures -> head -> share right, as measured after training."""

    @classmethod
    def load(cls, path: Path | None = None) -> Scorer:
        """Read a scorer's file, the committed one unless told otherwise.

        Raises:
            ScorerError: the file is no scorer, or one for another world.
        """
        path = path or path_of(FILE)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ScorerError(f"{path} is no safetensors file: {error}") from error
        if metadata.get("world.format") != FORMAT:
            raise ScorerError(f"{path} is no {FORMAT} but {metadata.get('world.format', 'something else')}")
        if metadata["heads"] != _heads_as_json():
            raise ScorerError(f"{path} reads other attributes than this world has; train it again")
        network = ScorerNetwork()
        network.load_state_dict(tensors)
        return cls(network, json.loads(metadata["temperatures"]), json.loads(metadata["accuracies"]))

    def save(self, path: Path) -> None:
        """Write the file that `load` reads, weights in half precision."""
        tensors = {name: tensor.half().contiguous() for name, tensor in self.network.state_dict().items()}
        metadata = {
            "world.format": FORMAT,
            "heads": _heads_as_json(),
            "temperatures": json.dumps(self.temperatures),
            "accuracies": json.dumps(self.accuracies),
        }
        save_file(tensors, path, metadata)

    @torch.no_grad()
    def read(self, pictures: Tensor, batch: int = 256) -> Reading:
        """Read pictures (n, 3, 64, 64) in 0..1 on the processor.

        Raises:
            ValueError: the pictures have another shape.
        """
        if pictures.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"pictures must be (n, 3, {SIDE}, {SIDE}), got {tuple(pictures.shape)}")
        logits = logits_of(self.network, pictures.float(), batch)
        return Reading({name: (logits[name] / self.temperatures[name]).softmax(1) for name in HEADS})


def _heads_as_json() -> str:
    return json.dumps(HEADS)


@torch.no_grad()
def logits_of(network: ScorerNetwork, pictures: Tensor, batch: int = 256) -> dict[str, Tensor]:
    """Head -> (n, classes), computed in pieces."""
    pieces = [network(piece) for piece in pictures.split(batch)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in HEADS}


# Scenes to learn from


def scoring_scene(rng: random.Random) -> Scene:
    """A scene as the scorer is trained on: the base model's, and what that never sees, and what looks like it."""
    scene = taught_scene(rng) if rng.random() < 0.3 else random_scene(rng)
    return replace(scene, style=rng.choice(HELD_OUT_STYLES)) if rng.random() < 0.1 else scene


def taught_scene(rng: random.Random) -> Scene:
    """A held-out character or person or somebody much like one, alone or beside something else."""
    kind = rng.choices(("creature", "person"), weights=(2, 1))[0]
    while True:
        scene = random_scene(rng, "shape")
        thing = _taught_creature(rng, scene.background) if kind == "creature" else _taught_person(rng)
        if kind == "person" or contrasts(thing.colour, scene.background) or rng.random() < 0.3:
            break
    if rng.random() < 0.6:
        return replace(scene, things=(placed_alone(rng, thing),))
    other = rng.choices(
        (random_shape(rng, scene.background), _taught_creature(rng, scene.background), _taught_person(rng)),
        weights=(4, 2, 1),
    )[0]
    pair = placed_as_pair(rng, *rng.sample((thing, other), 2))
    # Blocks of 4 pixels are too coarse for the parts of things as small as those of a pair.
    return replace(scene, things=pair, style="flat" if scene.style == "pixel" else scene.style)


def _taught_creature(rng: random.Random, background: str) -> Creature:
    kind = rng.choices(("subject", "near miss", "odd"), weights=(45, 35, 20))[0]
    if kind == "odd":
        return replace(random_creature(rng, background), odd=rng.choice(list(COLOURS)))
    looks = rng.choice(list(SUBJECTS.values())).looks
    return looks if kind == "subject" else near_creature(rng, looks)


def near_creature(rng: random.Random, looks: Creature) -> Creature:
    """The creature with one or two of its PARTS changed so that it shows."""
    for part in rng.sample(PARTS, rng.choice((1, 1, 2))):
        taken = {getattr(looks, part)}
        if part in COLOUR_PARTS:
            taken |= {looks.second} if part == "odd" else {looks.colour, looks.second}
        classes = [None if value == NONE and part == "odd" else value for value in THING_HEADS[part]]
        looks = replace(looks, **{part: rng.choice([value for value in classes if value not in taken])})
    return looks


def _taught_person(rng: random.Random) -> Person:
    kind = rng.choices(("held out", "near miss", "anybody"), weights=(45, 35, 20))[0]
    who = rng.choice(list(PEOPLE.values()))
    if kind == "near miss":
        who = near_identity(rng, who)
    return Person(random_identity(rng) if kind == "anybody" else who, turn=rng.uniform(-1, 1))


def near_identity(rng: random.Random, who: Identity) -> Identity:
    """The person with one or two of the traits changed that tell who it is."""
    choices = {
        "skin": range(len(SKINS)),
        "hair": HAIR,
        "hair_colour": HAIR_COLOURS,
        "glasses": (False, True),
        "beard": (False, True),
    }
    for trait in rng.sample(list(choices), rng.choice((1, 1, 2))):
        others = [value for value in choices[trait] if value != getattr(who, trait)]
        who = replace(who, **{trait: rng.choice(others)})
    return who


# Training

EXAMPLES = 64000
SEED = 3
PLAN = Plan(steps=4000, batch=128, lr=2e-3, flat=0.4, clip=None, ema=0.995, seed=SEED)
UNSEEN = 2400
"""Pictures for the calibration, and as many again for the measurement."""
WEIGHTS = {"style": 4.0, "second": 2.0, "odd": 2.0}
"""Of attributes that are learned last because few pixels show them; 1 for the others."""
LATENT_NOISE = 0.25
"""Most that is added to latents, whose standard deviation is 1, before they are decoded."""


def train_scorer(work: Path, processes: int) -> None:
    """Train, calibrate and measure the scorer, and write ``work / FILE``.

    The autoencoder in ``work``, finished or not, shows the scorer what pictures look like that a model made; without
    one it is trained on blurred and noisy drawings alone.
    """
    in_processes(processes, work, _train_scorer, work)


def _train_scorer(work: Path, plan: Plan = PLAN, examples: int = EXAMPLES, unseen: int = UNSEEN) -> None:
    autoencoder = load_autoencoder(work)
    drawn, labels = _own_share(work, examples)
    rebuilt = reconstructions(autoencoder, drawn, seed=rank())
    torch.manual_seed(SEED)
    network = ScorerNetwork().to(memory_format=torch.channels_last)

    def loss_of(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawn), (count,), generator=generator)
        pictures = mixed(drawn[chosen], rebuilt[chosen], generator)
        return scoring_loss(network(degraded(pictures, generator).to(device())), labels[chosen].to(device()))

    fit("scorer", network, plan, loss_of, work)
    if rank() == 0:
        scorer = calibrated(network, autoencoder, unseen)
        scorer.save(work / FILE)
        for name, accuracy in scorer.accuracies.items():
            print(f"scorer: {name}: " + ", ".join(f"{head} {share:.4f}" for head, share in accuracy.items()))


def load_autoencoder(work: Path) -> NarrowAutoencoder | None:
    """The trained autoencoder, the one in training where that is not finished, None where there is none."""
    finished, unfinished = work / "autoencoder.weights.pt", work / "autoencoder.pt"
    if finished.exists():
        state = torch.load(finished, weights_only=True)
    elif unfinished.exists():
        state = torch.load(unfinished, weights_only=True)["module"]
    else:
        return None
    model = NarrowAutoencoder().eval().to(memory_format=torch.channels_last)
    model.load_state_dict(state)
    return model


def _own_share(work: Path, examples: int) -> tuple[Tensor, Tensor]:
    """This process's part of the drawn pictures and their labels, kept in a file for the next start."""
    path = work / f"scorer_examples_{examples}_{rank() + 1}_of_{world_size()}.pt"
    if not path.exists():
        drawn = drawn_examples("scorer", range(rank(), examples, world_size()))
        torch.save(drawn, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    return torch.load(path, weights_only=True)


def drawn_examples(name: str, numbers: range) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 64, 64) as bytes and labels (n, heads); name and number decide a scene."""
    scenes = [scoring_scene(random.Random(f"{name}/{number}")) for number in numbers]
    return torch.stack([draw_bytes(scene) for scene in scenes]), target_table(scenes)


@torch.no_grad()
def reconstructions(autoencoder: NarrowAutoencoder | None, drawn: Tensor, seed: int, batch: int = 100) -> Tensor:
    """The pictures, as bytes, after encoding, some noise and decoding; unchanged without an autoencoder."""
    if autoencoder is None:
        return drawn
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for piece in drawn.split(batch):
        latents = autoencoder.encode(in_unit_range(piece).contiguous(memory_format=torch.channels_last))
        strength = LATENT_NOISE * torch.rand(len(piece), 1, 1, 1, generator=generator)
        decoded = autoencoder.decode(latents + strength * torch.randn(latents.shape, generator=generator))
        pieces.append((decoded.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(pieces).contiguous()


def mixed(drawn: Tensor, rebuilt: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures as they were drawn, half as the autoencoder shows them, floats in 0..1."""
    first = torch.rand(len(drawn), 1, 1, 1, generator=generator) < 0.5
    return in_unit_range(torch.where(first, drawn, rebuilt))


def degraded(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures shifted, blurred, tinted and made noisy, each in its own measure and some hardly at all."""
    count = len(pictures)

    def amount(*shape: int) -> Tensor:
        return torch.rand(count, *shape, 1, 1, generator=generator)

    wide = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    offsets = torch.randint(5, (count, 2), generator=generator).tolist()
    pictures = torch.stack([one[:, y : y + SIDE, x : x + SIDE] for one, (y, x) in zip(wide, offsets)])
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, (2 * amount(1) - 1).clamp(min=0))
    contrast, brightness = 1 + 0.16 * (amount(1) - 0.5), 0.08 * (amount(3) - 0.5)
    pictures = (pictures - 0.5) * contrast + 0.5 + brightness
    noise = 0.05 * (2 * amount(1) - 1).clamp(min=0)
    return (pictures + noise * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def scoring_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of all heads over the pictures that have the attribute; attributes that few of the batch have
    weigh a little less, or they would be mostly noise."""
    losses = []
    for column, name in enumerate(HEADS):
        label = labels[:, column]
        total = F.cross_entropy(logits[name], label, ignore_index=IGNORED, reduction="sum")
        weight = WEIGHTS.get(name.rpartition(".")[2], 1.0)
        losses.append(weight * total / ((label != IGNORED).sum() + 8))
    return torch.stack(losses).mean()


def calibrated(network: ScorerNetwork, autoencoder: NarrowAutoencoder | None, unseen: int) -> Scorer:
    """The network as its file will have it, with temperatures from and accuracies on pictures it has not seen."""
    network = network.half().float().eval()
    generator = torch.Generator().manual_seed(SEED)
    drawn, labels = drawn_examples("scorer calibration", range(unseen))
    rebuilt = reconstructions(autoencoder, drawn, seed=SEED)
    logits = logits_of(network, degraded(mixed(drawn, rebuilt, generator), generator))
    temperatures = {
        name: temperature_of(logits[name], labels[:, column]) if (labels[:, column] != IGNORED).any() else 1.0
        for column, name in enumerate(HEADS)
    }
    drawn, labels = drawn_examples("scorer measurement", range(unseen))
    rebuilt = reconstructions(autoencoder, drawn, seed=SEED + 1)
    clean = logits_of(network, in_unit_range(drawn))
    worse = logits_of(network, degraded(mixed(drawn, rebuilt, generator), generator))
    base_style = labels[:, list(HEADS).index("style")] < len(STYLES)
    accuracies = {
        "clean": accuracies_of(clean, labels, base_style),
        "degraded": accuracies_of(worse, labels, base_style),
        "clean, held-out styles": accuracies_of(clean, labels, ~base_style),
    }
    return Scorer(network, temperatures, accuracies)


def temperature_of(logits: Tensor, label: Tensor) -> float:
    """What to divide logits (n, classes) by so that labels (n,) are likeliest; IGNORED ones do not count."""
    candidates = torch.logspace(-1, 1, 81, base=4)
    losses = [F.cross_entropy(logits / candidate, label, ignore_index=IGNORED) for candidate in candidates]
    return candidates[torch.stack(losses).argmin()].item()


def accuracies_of(logits: dict[str, Tensor], labels: Tensor, counted: Tensor) -> dict[str, float]:
    """Share of right classes by attribute, over both slots, among the counted (n,) pictures that have it."""
    hits: dict[str, list[Tensor]] = {}
    for column, name in enumerate(HEADS):
        label = labels[:, column]
        asked = counted & (label != IGNORED)
        hits.setdefault(name.split(".")[-1], []).append((logits[name].argmax(1) == label)[asked])
    right = {name: torch.cat(pieces).float() for name, pieces in hits.items()}
    return {name: round(values.mean().item(), 4) for name, values in right.items() if len(values)}
