"""What the base model never sees: characters, people and picture styles to be taught afterwards.

Each character comes as five pictures with comprehensive captions, base captions and exact masks, written to a
folder as the trainers read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from scenes import Creature, Identity


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
