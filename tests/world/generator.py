"""Random scenes as the base model is trained on them: everything but the held-out characters, people and styles.

Whatever is random is drawn from the generator that the caller gives, so a seed names a scene.
"""

from __future__ import annotations

import random
from dataclasses import replace

from scenes import (
    BACKGROUNDS,
    BODIES,
    COLOURS,
    EYES,
    HAIR,
    HAIR_COLOURS,
    MIDDLE,
    PAIR_PLACES,
    PAIR_RADIUS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    SKINS,
    STYLES,
    TAILS,
    TOPS,
    Creature,
    Identity,
    Person,
    Scene,
    Shape,
    Thing,
    colours_on,
)
from subjects import HELD_OUT_FACES, HELD_OUT_LOOKS


def random_shape(rng: random.Random, background: str) -> Shape:
    texture = "striped" if rng.random() < 0.25 else "plain"
    return Shape(rng.choice(SHAPES), rng.choice(colours_on(background)), texture)


def random_creature(rng: random.Random, background: str) -> Creature:
    """A creature that is none of the held-out ones."""
    while True:
        colour = rng.choice(colours_on(background))
        creature = Creature(
            body=rng.choice(BODIES),
            colour=colour,
            second=rng.choice([other for other in COLOURS if other != colour]),
            top=rng.choice(TOPS),
            eyes=rng.choice((1, 2)),
            belly=rng.random() < 0.5,
            feet=rng.random() < 0.5,
            tail=rng.choice(TAILS),
        )
        if creature.looks not in HELD_OUT_LOOKS:
            return creature


def random_identity(rng: random.Random) -> Identity:
    """Somebody who is none of the held-out people."""
    while True:
        identity = Identity(
            head=rng.uniform(0.78, 1.0),
            skin=rng.randrange(len(SKINS)),
            hair=rng.choice(HAIR),
            hair_colour=rng.choice(list(HAIR_COLOURS)),
            eyes=rng.choice(list(EYES)),
            eye_distance=rng.uniform(0.3, 0.46),
            glasses=rng.random() < 0.3,
            beard=rng.random() < 0.3,
        )
        if (identity.skin, identity.hair, identity.hair_colour) not in HELD_OUT_FACES:
            return identity


def placed_alone(rng: random.Random, thing: Thing, place: str | None = None, size: str | None = None) -> Thing:
    """The thing as the only one of its picture, at a place and a size that are random unless given."""
    x = PLACES[place or rng.choice(list(PLACES))] + rng.randint(-1, 1)
    y = MIDDLE + rng.randint(-2, 2)
    radius = SIZES[size or rng.choice(list(SIZES))]
    if isinstance(thing, Person):
        radius, y = 18.0 + rng.randint(-1, 1), MIDDLE + 2
    elif isinstance(thing, Creature):
        radius = max(radius, 16.0)
        x = min(max(x, 1.3 * radius), SIDE - 1.3 * radius)  # the tail, too, stays in the picture
    return replace(thing, x=x, y=y, radius=radius)


def placed_as_pair(rng: random.Random, left: Thing, right: Thing) -> tuple[Thing, Thing]:
    """Two things side by side, a gap of one latent cell between them."""
    pair = []
    for thing, x in zip((left, right), PAIR_PLACES.values()):
        pair.append(replace(thing, x=x + rng.choice((-0.5, 0, 0.5)), y=MIDDLE + rng.randint(-1, 1), radius=PAIR_RADIUS))
    return tuple(pair)


def random_scene(rng: random.Random, kind: str | None = None, style: str | None = None) -> Scene:
    """A scene as the base model is trained on.

    Args:
        kind: "shape", "pair", "creature", "creature and shape" or "person"; weighted at random when None.
        style: one of STYLES; weighted at random when None.
    """
    if kind is None:
        kind = rng.choices(("shape", "pair", "creature", "creature and shape", "person"), weights=(30, 28, 18, 10, 14))[
            0
        ]
    if style is None:
        style = rng.choices(STYLES, weights=(48, 13, 13, 13, 13))[0]
    background = rng.choice(list(BACKGROUNDS))
    if kind == "shape":
        things = (placed_alone(rng, random_shape(rng, background)),)
    elif kind == "creature":
        things = (placed_alone(rng, random_creature(rng, background)),)
    elif kind == "person":
        person = Person(random_identity(rng), turn=rng.uniform(-1, 1))
        things = (placed_alone(rng, person),)
    else:
        first = random_creature(rng, background) if kind == "creature and shape" else random_shape(rng, background)
        second = random_shape(rng, background)
        while (getattr(first, "shape", None), first.colour) == (second.shape, second.colour):
            second = random_shape(rng, background)
        things = placed_as_pair(rng, *rng.sample((first, second), 2))
    return Scene(background, things, style)
