"""What is measured of Perfusion: things taught as concepts, as words and as LoRAs, drawn alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from captions import COMPREHENSIVE, caption
from concept_methods import BETA, ConceptPainter, make_covariance, perfusion, textual_inversion
from experiments import BASE_DESCRIPTION, BASE_WORD, MAIN_BASE, Files
from methods import Job, Painter, dreambooth_lora
from pair_scores import PairScores, pair_scores_of
from prompts import Prompt, suitable
from scenes import BACKGROUNDS, Creature, Shape, contrasts
from scorer import Scorer
from scores import Scores, scores_of
from subjects import SUBJECTS, WORD, Lesson, subject_lesson, training_scenes, write_lesson
from torch import Tensor

from comfyui_personalize.models.perfusion import Concept

BETAS = (BETA, 0.95, 1.25)
"""Biases of the gate, rising; a resemblance of 1 is that of the target input itself."""
WORDS, LORA = "textual_inversion", "dreambooth_lora"
GATE, LOCKED = "perfusion, beta {:g}", "perfusion, global key locking"
GATED_REMOVAL = "the same, removal where the gate opens, beta {:g}"


@dataclass(frozen=True)
class Thing:
    """Something that is taught: how it looks, what it is in ordinary words, and those that describe it."""

    name: str
    looks: Creature | Shape
    word: str
    description: str

    @property
    def token(self) -> str:
        return f"<{self.name}>"


THINGS = {
    **{name: Thing(name, SUBJECTS[name].looks, WORD, SUBJECTS[name].description) for name in ("zib", "mok")},
    "kro": Thing("kro", Shape("star", "red", "striped"), "star", "a red striped star"),
}
ALONE = "zib"
PAIR, ALIKE = ("zib", "kro"), ("zib", "mok")
"""Of different superclasses, and of one; the second is drawn with concepts alone."""


def write_thing(folder: Path, thing: Thing) -> Path:
    """Its five pictures with captions and masks, as the trainers read them."""
    if isinstance(thing.looks, Creature):
        return write_lesson(folder, subject_lesson(SUBJECTS[thing.name]), masks=True)
    scenes = training_scenes(thing)
    said = [
        [caption(scene, COMPREHENSIVE, names={scene.things[0]: f"a {word}"}) for scene in scenes]
        for word in (thing.token, thing.word)
    ]
    return write_lesson(folder, Lesson(thing.token, thing.word, scenes, *map(tuple, said)), masks=True)


@dataclass(frozen=True)
class Drawn:
    """Some pictures and what was read in them."""

    method: str
    seed: int
    things: tuple[str, ...]
    """One, or the two of a pair."""
    scores: Scores | PairScores
    prompts: tuple[str, ...]
    pictures: Tensor
    """(n, 3, 64, 64) in 0..1."""


@dataclass(frozen=True)
class Gates:
    """How alike the words of a pair are to both target inputs."""

    seed: int
    things: tuple[str, ...]
    cosine: float
    """Of the two target inputs in the inner product of C⁻¹."""
    alike: list[list[float]]
    """Resemblance of each word's encoding, by row, to each concept's target input."""
    others: float
    """The largest resemblance at any other position of the prompt."""


@dataclass(frozen=True)
class Measured:
    """Everything that the report is made of."""

    seeds: tuple[int, ...]
    drawn: list[Drawn]
    gates: list[Gates]

    def of(self, method: str, *things: str) -> list[Drawn]:
        return [one for one in self.drawn if (one.method, one.things) == (method, things)]


def measure(files: Files, seeds: Sequence[int], prompts: Sequence[Prompt], steps: int) -> Measured:
    """Teach and draw everything, with one computing thread."""
    torch.set_num_threads(1)
    found = Measured(tuple(seeds), [], [])
    for seed in seeds:
        Bench(files, seed, prompts, found).measure(steps)
    return found


class Bench:
    """The work of one training seed, kept in ``found``."""

    def __init__(self, files: Files, seed: int, prompts: Sequence[Prompt], found: Measured) -> None:
        self.files, self.seed, self.prompts, self.found = files, seed, prompts, found
        self.checkpoint, self.scorer = files.models[MAIN_BASE], Scorer.load(files.scorer)
        self.covariance = make_covariance(self.checkpoint, files.work / "covariances")

    def measure(self, steps: int) -> None:
        concepts = {name: perfusion(self.job(name, steps), self.covariance) for name in THINGS}
        loras = {name: dreambooth_lora(self.job(name, steps)) for name in PAIR}
        taught = {WORDS: textual_inversion(self.job(ALONE, steps)), LORA: loras[ALONE]}
        untaught = Painter(self.checkpoint)
        self.alone(BASE_WORD, untaught, WORD)
        self.alone(BASE_DESCRIPTION, untaught, THINGS[ALONE].description)
        for method, learned in taught.items():
            self.alone(method, Painter(self.checkpoint, [learned]))
        for beta in BETAS:
            for method, gated in ((GATE, False), (GATED_REMOVAL, True)):
                painter = ConceptPainter(self.checkpoint, [concepts[ALONE]], beta=beta, gated_removal=gated)
                self.alone(method.format(beta), painter)
        self.alone(LOCKED, ConceptPainter(self.checkpoint, [concepts[ALONE]]), locked=True)
        for pair in (PAIR, ALIKE):
            self.together(BASE_WORD, untaught, pair, *[f"a {THINGS[name].word}" for name in pair])
            self.together(BASE_DESCRIPTION, untaught, pair, *[THINGS[name].description for name in pair])
            if pair == PAIR:
                self.together(LORA, Painter(self.checkpoint, [loras[name] for name in pair]), pair)
            both = ConceptPainter(self.checkpoint, [concepts[name] for name in pair])
            self.together(GATE.format(BETA), both, pair)
            self.together(LOCKED, both, pair, locked=True)
            self.found.gates.append(gates_of(both, [concepts[name] for name in pair], self.seed, pair))

    def job(self, name: str, steps: int) -> Job:
        output = self.files.work / MAIN_BASE
        lesson = write_thing(output / f"seed{self.seed}" / name, THINGS[name])
        return Job(self.checkpoint, lesson, output, steps, self.seed)

    def alone(self, method: str, painter: Painter, called: str = "", **more: object) -> None:
        """Draw the one character, by default under its token."""
        subject = SUBJECTS[ALONE]
        asked = suitable(tuple(self.prompts), subject.looks)
        words = [prompt.naming(called or subject.token) for prompt in asked]
        pictures = painter.draw(words, [1000 * self.seed + number for number in range(len(words))], **more)
        self.keep(method, (ALONE,), scores_of(self.scorer.read(pictures), asked, subject), words, pictures)

    def together(self, method: str, painter: Painter, pair: tuple[str, str], *called: str, **more: object) -> None:
        """Draw a pair, by default under its tokens."""
        words, left, right = pair_prompts(pair, *(called or [f"a {THINGS[name].token}" for name in pair]))
        pictures = painter.draw(words, [1000 * self.seed + 500 + number for number in range(len(words))], **more)
        self.keep(method, pair, pair_scores_of(self.scorer.read(pictures), left, right), words, pictures)

    def keep(self, method: str, things: tuple[str, ...], scores, words: list[str], pictures: Tensor) -> None:
        self.found.drawn.append(Drawn(method, self.seed, things, scores, tuple(words), pictures))


def pair_prompts(pair: tuple[str, str], first: str, second: str) -> tuple[list[str], list, list]:
    """Both orders on every background that suits both, and what must be seen on the left and on the right."""
    looks = [THINGS[name].looks for name in pair]
    words, left, right = [], [], []
    for background in BACKGROUNDS:
        if all(contrasts(one.colour, background) for one in looks):
            for names, sides in (((first, second), looks), ((second, first), looks[::-1])):
                words.append(f"{names[0]} on the left and {names[1]} on the right {background}")
                left.append(sides[0])
                right.append(sides[1])
    return words, left, right


def gates_of(painter: ConceptPainter, concepts: Sequence[Concept], seed: int, pair: tuple[str, str]) -> Gates:
    """Resemblances in a prompt with both words."""
    (words, *_), *_ = pair_prompts(pair, *(f"a {concept.trigger}" for concept in concepts))
    encodings = painter.encodings([words])[0]
    duals = torch.stack([concept.parts.dual for concept in concepts])
    inputs = torch.stack([concept.parts.target_input for concept in concepts])
    gram = inputs @ duals.T
    alike = encodings @ duals.T / gram.diagonal()  # (tokens, concepts)
    places = [painter.row_of(words, concept.trigger) for concept in concepts]
    rest = [place for place in range(len(encodings)) if place not in places]
    return Gates(
        seed,
        pair,
        float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()),
        [[float(alike[place, number]) for number in range(len(concepts))] for place in places],
        float(alike[rest].max()),
    )
