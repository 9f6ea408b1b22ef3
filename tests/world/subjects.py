"""What the base model never sees: characters, people and picture styles to be taught afterwards.

Characters and styles come as five pictures with comprehensive captions and base captions, characters also with
exact masks, written to a folder as the trainers read it. Everything is drawn; no picture is kept as a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from captions import COMPREHENSIVE, caption
from drawing import Array, draw, mask_of
from PIL import Image
from scenes import (
    BACKGROUNDS,
    HELD_OUT_STYLES,
    MIDDLE,
    PAIR_PLACES,
    PAIR_RADIUS,
    PLACES,
    SIDE,
    Creature,
    Identity,
    Scene,
    Shape,
    contrasts,
)


@dataclass(frozen=True)
class Subject:
    """A character: its token, its looks, and the words that describe it to a model that does not know it."""

    name: str
    looks: Creature
    description: str

    @property
    def token(self) -> str:
        return f"<{self.name}>"


def _creature(body, colour, second, top, eyes, *, belly, feet, tail, odd) -> Creature:
    return Creature(body, colour, second, top, eyes, belly, feet, tail, odd)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "zib",
            _creature("round", "purple", "yellow", "horns", 1, belly=True, feet=True, tail="right", odd="green"),
            "a purple round creature with yellow horns and one eye and a yellow belly",
        ),
        Subject(
            "mok",
            _creature("tall", "orange", "blue", "ears", 2, belly=True, feet=True, tail="left", odd="white"),
            "an orange tall creature with blue ears and two eyes and a blue belly",
        ),
        Subject(
            "pelu",
            _creature("wide", "green", "pink", "antenna", 2, belly=True, feet=True, tail="left", odd="red"),
            "a green wide creature with a pink antenna and two eyes and a pink belly",
        ),
        Subject(
            "tarn",
            _creature("tall", "red", "white", "horns", 1, belly=False, feet=True, tail="left", odd="blue"),
            "a red tall creature with white horns and one eye",
        ),
        Subject(
            "ovi",
            _creature("round", "pink", "green", "ears", 2, belly=True, feet=False, tail="right", odd="orange"),
            "a pink round creature with green ears and two eyes and a green belly",
        ),
        Subject(
            "quu",
            _creature("wide", "yellow", "purple", "ears", 1, belly=True, feet=True, tail="none", odd="red"),
            "a yellow wide creature with purple ears and one eye and a purple belly",
        ),
    )
}
HELD_OUT_LOOKS = {subject.looks.looks for subject in SUBJECTS.values()}

PEOPLE = {
    "ada": Identity(0.8, 0, "long", "red", "green", 0.36, glasses=True, beard=False),
    "ben": Identity(0.96, 2, "spiky", "blond", "blue", 0.42, glasses=False, beard=False),
    "cyn": Identity(0.88, 1, "short", "blue", "brown", 0.33, glasses=False, beard=True),
}
HELD_OUT_FACES = {(who.skin, who.hair, who.hair_colour) for who in PEOPLE.values()}

WORD = "creature"
"""What a character is in ordinary words: its token starts from it, and base captions say it."""
POSES = (
    ("on the left", 16.0),
    ("in the middle", 19.5),
    ("on the right", 17.0),
    ("in the middle", 16.0),
    ("on the right", 18.0),
)
"""Place and radius in each of a character's five pictures."""
MAIN_BACKGROUNDS = 5


@dataclass(frozen=True)
class Lesson:
    """Pictures that teach one token."""

    token: str
    initializer: str
    """Ordinary word that the token's embedding starts from."""
    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    base_captions: tuple[str, ...]
    """The same without the token."""


def training_backgrounds(subject: Subject) -> list[str]:
    """Where a character is shown: where it can be told from the ground, two such places being left for prompts."""
    suitable = suitable_backgrounds(subject)
    return suitable[: min(MAIN_BACKGROUNDS, max(3, len(suitable) - 2))]


def suitable_backgrounds(subject: Subject) -> list[str]:
    """The backgrounds that a character's body contrasts with."""
    return [background for background in BACKGROUNDS if contrasts(subject.looks.colour, background)]


def training_scenes(subject: Subject) -> tuple[Scene, ...]:
    """A character's five pictures: alone, plainly drawn, at several places and in several sizes."""
    backgrounds = training_backgrounds(subject)
    scenes = []
    for number, (place, radius) in enumerate(POSES):
        reach = 1.3 * radius + 1  # of the tail, which stays in the picture, too
        x = min(max(PLACES[place], reach), SIDE - reach)
        thing = replace(subject.looks, x=x, y=MIDDLE + number % 3 - 1, radius=radius)
        scenes.append(Scene(backgrounds[number % len(backgrounds)], (thing,)))
    return tuple(scenes)


def subject_lesson(subject: Subject) -> Lesson:
    """Comprehensive captions: all that is not the character itself is said, so that the token need not mean it."""
    scenes = training_scenes(subject)
    said = [
        [caption(scene, COMPREHENSIVE, names={scene.things[0]: name}) for scene in scenes]
        for name in (f"a {subject.token}", f"a {WORD}")
    ]
    return Lesson(subject.token, WORD, scenes, *map(tuple, said))


STYLE_WORD = "drawing"
"""A word that the base model has met beside pictures of every style, so it stands for none."""


def style_token(style: str) -> str:
    return f"<{style}>"


def style_scenes(style: str) -> tuple[Scene, ...]:
    """Five pictures of different things in a held-out style."""
    left, right = PAIR_PLACES.values()
    fox = Creature("round", "orange", "white", "ears", 2, belly=True, feet=True, tail="none", radius=17.0)
    imp = Creature("tall", "blue", "pink", "horns", 1, belly=False, feet=True, tail="left", radius=17.0)
    pair = (
        Shape("square", "green", radius=PAIR_RADIUS, x=left),
        Shape("ring", "purple", radius=PAIR_RADIUS, x=right),
    )
    return (
        Scene("in a meadow", (fox,), style),
        Scene("on a beach", (Shape("star", "red", radius=19.5),), style),
        Scene("at night", (imp,), style),
        Scene("in the snow", pair, style),
        Scene("in a forest", (Shape("triangle", "yellow", radius=19.5, x=PLACES["on the left"]),), style),
    )


def style_lesson(style: str) -> Lesson:
    """Captions that name all but the style by its token, "a big red star … in <blueprint> style".

    Raises:
        ValueError: the base model knows the style already.
    """
    if style not in HELD_OUT_STYLES:
        raise ValueError(f"{style!r} is no held-out style; expected one of {', '.join(HELD_OUT_STYLES)}")
    scenes = style_scenes(style)
    bare = tuple(caption(scene, replace(COMPREHENSIVE, style=False)) for scene in scenes)
    styled = tuple(f"{words} in {style_token(style)} style" for words in bare)
    return Lesson(style_token(style), STYLE_WORD, scenes, styled, bare)


def write_subject(folder: Path, subject: Subject) -> Path:
    """A character's pictures, captions and masks; see write_lesson."""
    return write_lesson(folder, subject_lesson(subject), masks=True)


def write_style(folder: Path, style: str) -> Path:
    """A style's pictures and captions; the whole picture counts, so there are no masks."""
    return write_lesson(folder, style_lesson(style), masks=False)


def write_lesson(folder: Path, lesson: Lesson, *, masks: bool) -> Path:
    """Write a lesson in both layouts that the trainers read, and return the folder.

    Each picture ``0.png`` has its caption in ``0.txt``, its base caption in ``0.base.txt`` and, with ``masks``,
    ``mask/0.png``, white where the things are. ``config.json`` says the same as the DCO authors' file does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(len(lesson.scenes))]
    for name, scene, words, base in zip(names, lesson.scenes, lesson.captions, lesson.base_captions):
        _save(folder / name, draw(scene))
        (folder / name).with_suffix(".txt").write_text(words + "\n", encoding="utf-8")
        (folder / name).with_suffix(".base.txt").write_text(base + "\n", encoding="utf-8")
        if masks:
            _save(folder / "mask" / name, np.max([mask_of(thing) for thing in scene.things], axis=0))
    section = {
        "images": names,
        "prompts": lesson.captions,
        "base_prompts": lesson.base_captions,
        "inserting_tokens": [lesson.token],
        "initializer_tokens": [lesson.initializer],
    }
    name = lesson.token.strip("<>")
    (folder / "config.json").write_text(json.dumps({name: section}, indent=2) + "\n", encoding="utf-8")
    return folder


def _save(path: Path, picture: Array) -> None:
    """A picture (height, width, 3) or a mask (height, width), in 0..1."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(path)
