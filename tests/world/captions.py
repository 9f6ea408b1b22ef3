"""Scenes to words: a small grammar in which every clause can be left out.

A comprehensive caption names all that a model could not guess; a short one names the thing alone. Captions keep
below 40 words, far inside the 75 tokens of a CLIP prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from scenes import PAIR_PLACES, PLACES, Creature, Person, Scene, Shape, Thing


@dataclass(frozen=True)
class Detail:
    """Which clauses a caption has."""

    colour: bool = True
    texture: bool = True
    size: bool = True
    parts: bool = True
    place: bool = True
    background: bool = True
    style: bool = True


COMPREHENSIVE = Detail()
SHORT = Detail(texture=False, size=False, parts=False, place=False, background=False, style=False)


def caption(scene: Scene, detail: Detail = COMPREHENSIVE, *, names: dict[Thing, str] | None = None) -> str:
    """A scene in words.

    Args:
        names: what to call some of the things instead of describing them, article included, such as
            ``{subject: "a <zib>"}``.
    """
    places = PAIR_PLACES if len(scene.things) == 2 else PLACES
    phrases = []
    for thing in scene.things:
        phrase = (names or {}).get(thing) or describe(thing, detail, alone=len(scene.things) == 1)
        if detail.place:
            phrase += " " + min(places, key=lambda place: abs(places[place] - thing.x))
        phrases.append(phrase)
    words = " and ".join(phrases)
    if detail.background:
        words += f" {scene.background}"
    if detail.style and scene.style != "flat":
        words += f" in {scene.style} style"
    return words


def describe(thing: Thing, detail: Detail = COMPREHENSIVE, *, alone: bool = True) -> str:
    """A thing in words, with its article; sizes differ only where it is alone in its picture."""
    if isinstance(thing, Shape):
        words = [thing.size if detail.size and alone else ""]
        words += [thing.colour if detail.colour else ""]
        words += ["striped" if detail.texture and thing.texture == "striped" else "", thing.shape]
        return with_article(words)
    if isinstance(thing, Creature):
        return _describe_creature(thing, detail)
    return _describe_person(thing, detail)


def with_article(words: list[str]) -> str:
    phrase = " ".join(word for word in words if word)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _describe_creature(creature: Creature, detail: Detail) -> str:
    phrase = with_article([creature.colour if detail.colour else "", creature.body if detail.parts else "", "creature"])
    if not detail.parts:
        return phrase
    parts = []
    if creature.top == "antenna":
        parts.append(with_article([creature.second, "antenna"]))
    elif creature.top != "none":
        parts.append(f"{creature.second} {creature.top}")
    parts.append("one eye" if creature.eyes == 1 else "two eyes")
    if creature.belly:
        parts.append(with_article([creature.second, "belly"]))
    return f"{phrase} with {' and '.join(parts)}"


def _describe_person(person: Person, detail: Detail) -> str:
    who = person.identity
    if not detail.parts:
        return "a person"
    parts = ["no hair" if who.hair == "no" else f"{who.hair} {who.hair_colour} hair"]
    if who.glasses:
        parts.append("glasses")
    if who.beard:
        parts.append(with_article([who.hair_colour, "beard"]))
    return f"a person with {' and '.join(parts)}"


def random_detail(rng: random.Random) -> Detail:
    """Each clause in or out, so that a model learns captions of every length."""
    if rng.random() < 0.4:
        return COMPREHENSIVE
    return Detail(
        colour=rng.random() < 0.85,
        texture=rng.random() < 0.8,
        size=rng.random() < 0.5,
        parts=rng.random() < 0.5,
        place=rng.random() < 0.5,
        background=rng.random() < 0.75,
        style=rng.random() < 0.9,
    )


PICTURES = ("photo", "picture", "image", "rendering", "drawing", "painting", "depiction")
MANNERS = (*[""] * 3, *"good bright dark cropped close-up nice small large clean cool weird".split())


def random_caption(rng: random.Random, scene: Scene) -> str:
    """A caption as the base model is trained on; some begin like a photograph's, some lack their article, because
    the templates of the methods and the prompts of people do."""
    words = caption(scene, random_detail(rng))
    if rng.random() < 0.35:
        manner, article = rng.choice(MANNERS), rng.choice(("a", "a", "the"))
        head = " ".join(part for part in (article, manner, rng.choice(PICTURES), "of") if part)
        first, rest = words.split(" ", 1)
        words = f"{head} {rng.choice((first, first, first, 'the', 'my', 'one'))} {rest}"
    elif rng.random() < 0.1:
        words = words.split(" ", 1)[1]
    return words


def swap_word(words: str, old: str, new: str) -> str:
    """The caption with every whole word ``old`` replaced, its article in order.

    Raises:
        ValueError: the word does not occur.
    """
    pieces = words.split(" ")
    if old not in pieces:
        raise ValueError(f"no word {old!r} in {words!r}")
    pieces = [new if piece == old else piece for piece in pieces]
    for index, (article, following) in enumerate(zip(pieces, pieces[1:])):
        if article in ("a", "an"):
            pieces[index] = "an" if following[0] in "aeiou" else "a"
    return " ".join(pieces)
