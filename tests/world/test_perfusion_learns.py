"""Whether a Perfusion concept of the small world's trained model looks like its character, seen by the scorer."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import concept_experiments  # noqa: E402 - lies in the folder that was just added
from concept_methods import ConceptPainter, make_covariance, perfusion  # noqa: E402
from experiments import MAIN_BASE, Files  # noqa: E402
from methods import Job, Painter  # noqa: E402
from pair_scores import pair_scores_of  # noqa: E402
from prompts import REPORTING, suitable  # noqa: E402
from scenes import Scene, Shape  # noqa: E402
from scorer import HEADS, Reading, Scorer, targets_of  # noqa: E402
from scores import scores_of  # noqa: E402
from subjects import SUBJECTS, WORD  # noqa: E402

ZIB = SUBJECTS["zib"]
STEPS = 100
CAPTIONS = 400
SHAPES = ["a red star in the snow", "a green square on the left in a room"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(checkpoint, the character as a concept after a third of the usual steps)."""
    files = Files.committed(tmp_path_factory.mktemp("taught"))
    checkpoint = files.models[MAIN_BASE]
    lesson = concept_experiments.write_thing(files.work / "zib", concept_experiments.THINGS["zib"])
    covariance = make_covariance(checkpoint, files.work / "covariances", CAPTIONS)
    return checkpoint, perfusion(Job(checkpoint, lesson, files.work, STEPS), covariance), Scorer.load(files.scorer)


@pytest.mark.slow
def test_a_concept_teaches_a_character_and_its_gate_closes_it(taught):
    checkpoint, concept, scorer = taught
    prompts = suitable(REPORTING, ZIB.looks)[:6]

    def parts(painter, name):
        drawn = painter.draw([prompt.naming(name) for prompt in prompts], range(len(prompts)))
        return scores_of(scorer.read(drawn), prompts, ZIB)

    base = parts(Painter(checkpoint), WORD)
    shown = parts(ConceptPainter(checkpoint, [concept]), ZIB.token)
    closed = parts(ConceptPainter(checkpoint, [concept], beta=float("inf")), ZIB.token)
    assert shown.parts > max(0.45, base.parts + 0.1, closed.parts + 0.05)
    assert shown.background > 0.8


@pytest.mark.slow
def test_its_gate_opens_at_its_word_and_other_prompts_stay_as_they_are(taught):
    checkpoint, concept, _ = taught
    painter = ConceptPainter(checkpoint, [concept])
    prompt = "a red star on the left and a <zib> on the right in the snow"
    alike = painter.encodings([prompt])[0] @ concept.parts.dual / (concept.parts.target_input @ concept.parts.dual)
    row = painter.row_of(prompt, "<zib>")
    assert alike[row] > 0.7
    assert torch.cat([alike[:row], alike[row + 1 :]]).max() < 0.5
    with_concept, without = (one.draw(SHAPES, range(2)) for one in (painter, Painter(checkpoint)))
    assert (with_concept - without).abs().mean() < 0.03


def test_two_things_are_scored_on_their_own_sides():
    star, mok = Shape("star", "red", "striped"), SUBJECTS["mok"].looks

    def reading(left, right):
        found = {name: torch.zeros(1, len(classes)) for name, classes in HEADS.items()}
        for name, target in targets_of(Scene("in the snow", (left, right))).items():
            found[name][0, target] = 1
        return Reading(found)

    def score(shown, asked):
        return pair_scores_of(reading(*shown), [asked[0]], [asked[1]])

    right = score((ZIB.looks, star), (ZIB.looks, star))
    assert (right.looks, right.bleeding, right.both) == (1, 0, 1)
    painted = score((ZIB.looks, Shape("star", "purple")), (ZIB.looks, star))
    assert (painted.looks, painted.bleeding, painted.both) == (0.5, 0.5, 0)
    turned = score((mok, ZIB.looks), (ZIB.looks, mok))
    assert turned.bleeding == 1 and turned.both == 0 and turned.looks < 0.6
