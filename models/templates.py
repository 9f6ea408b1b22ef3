"""Prompts around a new word, so that training tells the word from the way it is shown."""

from itertools import product
from typing import Literal

Kind = Literal["object", "style"]

_VIEWS = ("photo", "close-up photo", "dark photo", "bright photo", "cropped photo", "picture", "rendering")
_WORDS = ("a", "the", "my", "one", "a nice", "a clean", "a small", "the large", "the cool", "the weird")
_WORKS = ("painting", "rendering", "picture", "drawing", "still life", "portrait", "landscape", "cropped painting")
_TRAITS = ("a", "the", "a nice", "a dark", "a bright", "a small", "a large", "one")


def templates(kind: Kind) -> tuple[str, ...]:
    """Sentences with one ``{}`` for the word: it names an object, or the style of a work (arXiv 2208.01618)."""
    if kind == "object":
        return tuple(f"a {view} of {word} {{}}" for view, word in product(_VIEWS, _WORDS))
    return tuple(f"{trait} {work} in the style of {{}}" for trait, work in product(_TRAITS, _WORKS))


_PLACES = ("on a table", "in the garden", "in front of a house", "near the sea", "at night")
_THINGS = (
    "man", "woman", "child", "dog", "cat", "horse", "bird", "flower", "tree", "mountain", "river", "city", "street",
    "house", "room", "kitchen", "chair", "lamp", "car", "train", "boat", "plane", "bicycle", "cake", "apple", "cup",
    "book", "clock", "shoe", "dress", "hat", "bag", "guitar", "ball", "toy", "sculpture", "bridge", "church", "forest",
    "sky",
)  # fmt: skip


def ordinary_captions() -> tuple[str, ...]:
    """Two hundred captions of ordinary things, none like its neighbours."""
    openings = ("a", "photo of the", "two people and a", "an old painting of a", "the colourful")
    return tuple(
        f"{openings[(place + thing) % 5]} {name} {where}"
        for place, where in enumerate(_PLACES)
        for thing, name in enumerate(_THINGS)
    )
