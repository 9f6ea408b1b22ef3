"""What a picture of the small world can show: backgrounds, objects, creatures, people and picture styles.

A scene is plain data; `drawing` turns it into pixels and `captions` into words.
"""

from __future__ import annotations

from dataclasses import dataclass

SIDE = 64
"""Pictures are 64 x 64 pixels; all lengths are in pixels, y points down."""

Colour = tuple[int, int, int]

BACKGROUNDS: dict[str, tuple[Colour, Colour, Colour]] = {
    # phrase: colour at the top, above the horizon, and of the ground
    "in a meadow": ((120, 185, 235), (200, 228, 240), (122, 190, 92)),
    "on a beach": ((70, 175, 225), (170, 225, 235), (240, 214, 150)),
    "at night": ((16, 18, 50), (44, 44, 96), (26, 30, 44)),
    "in the snow": ((176, 190, 206), (214, 224, 234), (246, 249, 253)),
    "at sunset": ((232, 110, 96), (252, 196, 120), (120, 66, 84)),
    "under water": ((34, 140, 178), (20, 96, 146), (14, 66, 108)),
    "in a room": ((214, 190, 168), (226, 204, 182), (146, 100, 72)),
    "in a forest": ((88, 132, 96), (62, 102, 72), (56, 62, 38)),
}
HORIZON = 44

COLOURS: dict[str, Colour] = {
    "red": (218, 44, 44),
    "orange": (246, 142, 30),
    "yellow": (250, 220, 50),
    "green": (52, 158, 62),
    "blue": (44, 88, 206),
    "purple": (138, 62, 178),
    "pink": (246, 140, 188),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "striped")
SIZES = {"small": 14.0, "big": 19.5}
PAIR_RADIUS = 13.0
PLACES = {"on the left": 21.0, "in the middle": 32.0, "on the right": 43.0}
PAIR_PLACES = {"on the left": 16.0, "on the right": 48.0}
MIDDLE = 34.0
"""Height of the objects' centres."""

STYLES = ("flat", "sketch", "neon", "pixel", "clay")
HELD_OUT_STYLES = ("blueprint", "poster")
"""Never in the base model's training; what the style trainers are taught."""

CONTRAST = 95.0
"""Least distance (RGB, 0..255) between an object and each colour that it stands on."""


@dataclass(frozen=True)
class Shape:
    """One geometric object."""

    shape: str
    colour: str
    texture: str = "plain"
    radius: float = SIZES["small"]
    x: float = 32.0
    y: float = MIDDLE

    @property
    def size(self) -> str:
        return "big" if self.radius > 17 else "small"


@dataclass(frozen=True)
class Creature:
    """A procedural animal; `second` colours whatever `top`, belly, feet and tail there are."""

    body: str
    colour: str
    second: str
    top: str
    eyes: int
    belly: bool
    feet: bool
    tail: str
    odd: str | None = None
    """Colour of the right-hand ear, horn or antenna where it is another; generic creatures have none."""
    radius: float = SIZES["small"]
    x: float = 32.0
    y: float = MIDDLE

    @property
    def looks(self) -> tuple[str, str, str, str]:
        """What tells one kind of creature from another; the held-out ones' are never drawn at random."""
        return self.body, self.colour, self.top, self.second


BODIES = ("round", "tall", "wide")
TOPS = ("none", "ears", "horns", "antenna")
TAILS = ("none", "left", "right")


@dataclass(frozen=True)
class Identity:
    """Who a person is: all that stays when pose, place and style change."""

    head: float
    """Width of the head over its height."""
    skin: int
    hair: str
    hair_colour: str
    eyes: str
    eye_distance: float
    """Half the distance between the eyes over the head's radius."""
    glasses: bool
    beard: bool


HAIR = ("short", "long", "spiky", "no")
HAIR_COLOURS: dict[str, Colour] = {
    "black": (34, 30, 34),
    "brown": (112, 66, 34),
    "blond": (238, 204, 96),
    "red": (196, 74, 32),
    "blue": (52, 96, 200),
}
SKINS: tuple[Colour, ...] = ((250, 214, 186), (222, 166, 124), (150, 98, 66))
EYES: dict[str, Colour] = {"brown": (70, 40, 24), "blue": (40, 104, 214), "green": (30, 140, 70)}


@dataclass(frozen=True)
class Person:
    """A person in one picture: an identity and a pose."""

    identity: Identity
    turn: float = 0.0
    """Where the person looks: -1 left, 1 right."""
    radius: float = 18.0
    x: float = 32.0
    y: float = MIDDLE


Thing = Shape | Creature | Person


@dataclass(frozen=True)
class Scene:
    """A whole picture: one thing, or two with the left one first."""

    background: str
    things: tuple[Thing, ...]
    style: str = "flat"


def contrasts(colour: str, background: str) -> bool:
    """Whether an object of this colour can be told from the background."""
    return all(
        sum((a - b) ** 2 for a, b in zip(COLOURS[colour], ground)) ** 0.5 >= CONTRAST
        for ground in BACKGROUNDS[background]
    )


def colours_on(background: str) -> list[str]:
    return [colour for colour in COLOURS if contrasts(colour, background)]
