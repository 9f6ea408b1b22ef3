"""What the taught model is asked to draw: one list to choose settings with, another to report with.

The lists share no prompt. What a prompt must show is data (`Prompt.scene`), and its words follow from that, so the
scores never compare with something that was not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from captions import COMPREHENSIVE, caption
from scenes import MIDDLE, PAIR_PLACES, PAIR_RADIUS, PLACES, Creature, Scene, Shape, contrasts

LEFT, MIDDLE_PLACE, RIGHT = PLACES


@dataclass(frozen=True)
class Prompt:
    """A picture of the subject: where it is, what stands beside it, and how it is drawn."""

    background: str
    place: str | None = None
    """Of the subject; None leaves it open and out of the words."""
    other: Shape | None = None
    """A second object, on the side where the subject is not."""
    style: str = "flat"

    @property
    def template(self) -> str:
        """The words, with {} for the subject's name, such as "a {} on the left and a red star on the right"."""
        return self._words("{}")

    def naming(self, name: str) -> str:
        """The words for a subject of this name, "a {name}" unless the name begins with an article."""
        return self._words(name)

    def _words(self, name: str) -> str:
        scene = self.scene(_ANYONE)
        subject = next(thing for thing in scene.things if isinstance(thing, Creature))
        named = name if name.startswith(("a ", "an ")) else f"a {name}"
        return caption(scene, replace(COMPREHENSIVE, place=self.place is not None), names={subject: named})

    def scene(self, looks: Creature) -> Scene:
        """What must be seen, with a subject of these looks."""
        if self.other is None:
            subject = replace(looks, radius=17.0, x=PLACES[self.place or MIDDLE_PLACE], y=MIDDLE)
            return Scene(self.background, (subject,), self.style)
        across = LEFT if self.place == RIGHT else RIGHT
        subject = replace(looks, radius=PAIR_RADIUS, x=PAIR_PLACES[self.place], y=MIDDLE)
        other = replace(self.other, radius=PAIR_RADIUS, x=PAIR_PLACES[across], y=MIDDLE)
        return Scene(self.background, tuple(sorted((subject, other), key=lambda thing: thing.x)), self.style)


_ANYONE = Creature("round", "blue", "red", "none", 2, belly=False, feet=False, tail="none")

TUNING = (
    Prompt("in a meadow", RIGHT),
    Prompt("at night", LEFT),
    Prompt("under water", MIDDLE_PLACE),
    Prompt("in a room", RIGHT),
    Prompt("in a forest", LEFT),
    Prompt("in the snow", LEFT, Shape("circle", "blue")),
    Prompt("in a room", RIGHT, Shape("star", "yellow")),
    Prompt("at night", LEFT, Shape("square", "orange")),
    Prompt("in a meadow", RIGHT, Shape("cross", "red")),
    Prompt("on a beach", style="neon"),
    Prompt("in a forest", style="pixel"),
    Prompt("in the snow", style="sketch"),
    Prompt("in a meadow", style="clay"),
)
"""Settings may be chosen by these."""

REPORTING = (
    Prompt("in a meadow"),
    Prompt("on a beach"),
    Prompt("at night"),
    Prompt("in the snow"),
    Prompt("at sunset"),
    Prompt("under water"),
    Prompt("in a room"),
    Prompt("in a forest"),
    Prompt("in the snow", LEFT, Shape("star", "red")),
    Prompt("at night", RIGHT, Shape("ring", "blue")),
    Prompt("in a forest", LEFT, Shape("square", "yellow")),
    Prompt("under water", RIGHT, Shape("triangle", "green")),
    Prompt("in a meadow", LEFT, Shape("circle", "pink")),
    Prompt("in a room", RIGHT, Shape("cross", "blue")),
    Prompt("in a meadow", style="neon"),
    Prompt("on a beach", style="sketch"),
    Prompt("in a room", style="pixel"),
    Prompt("in a forest", style="clay"),
    Prompt("under water", style="sketch"),
    Prompt("in the snow", style="neon"),
)
"""What is reported; nothing is chosen by these."""


def suitable(prompts: tuple[Prompt, ...], looks: Creature) -> list[Prompt]:
    """The prompts in whose surroundings a subject of these looks can be seen at all."""
    return [prompt for prompt in prompts if contrasts(looks.colour, prompt.background)]


def in_style(prompts: tuple[Prompt, ...], style: str) -> list[Prompt]:
    """The plainly drawn prompts of the subject alone, drawn in another style instead."""
    return [replace(prompt, style=style) for prompt in prompts if prompt.style == "flat" and prompt.other is None]
