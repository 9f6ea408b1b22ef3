"""Whether the methods teach the small world's trained models anything, seen by the scorer.

The quick part teaches one character with DCO. The full one repeats the whole of results.md: pytest -m world_full
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import experiments  # noqa: E402 - lies in the folder that was just added
import results  # noqa: E402
from experiments import BASE_WORD, MAIN_BASE, OTHER_BASE, REWARD_SCALE, Bench, Files, Task, chosen  # noqa: E402
from methods import METHODS, Painter  # noqa: E402
from prompts import suitable  # noqa: E402
from scores import rises  # noqa: E402
from subjects import SUBJECTS, WORD  # noqa: E402

# Limits far below what was seen when the settings were chosen, and above what the base model reaches; so a broken
# method fails and another seed or processor does not.
SUBJECT = 0.08
"""Subject fidelity after the whole training; 0.32 ± 0.06 was seen with dco, 0.00 with the base model's class word."""
PARTS = 0.65
"""Share of the character's parts that are right; 0.91 ± 0.02 was seen, 0.32 with the base model's class word."""
PARTS_GAIN = 0.25
"""How far that is above the base model's with the class word."""
BACKGROUND = 0.8
"""Share of right backgrounds, of dco after the whole training."""
PROMPT = 0.6
"""Prompt fidelity of the same."""
SLIDER_STEP = 0.02
"""How much subject fidelity each of the quick part's reward scales adds to the one before."""
SLIDER = (0.0, 1.0, REWARD_SCALE)
OTHER_BASE_SUBJECT = 0.05
"""Subject fidelity of each method on the other base model."""
MERGED = 0.05
"""Share of pictures with subject and style, of dco's two LoRAs."""
REPRODUCED = (
    "At equal subject fidelity dco with reward guidance keeps more of the prompt than dreambooth_lora",
    "Subject fidelity rises monotonically with the scale of reward guidance",
    "Two LoRAs of dco draw the subject in the style without further training",
)
"""The papers' claims that hold here, with every seed."""


@dataclass(frozen=True)
class Taught:
    """What is drawn before and after a character was taught."""

    base: experiments.Record
    plain: experiments.Record
    rewarded: list[experiments.Record]
    """One for each scale of SLIDER."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The first character, taught to the SDXL-like model with one seed."""
    subject = SUBJECTS[experiments.FULL.subjects[0]]
    files = Files.committed(tmp_path_factory.mktemp("taught"))
    task = Task(files, experiments.FULL, MAIN_BASE, seed=0, subject=subject.name)
    bench = Bench(task, suitable(task.extent.prompts, subject.looks), drawn=1)
    base = bench.record(BASE_WORD, Painter(task.checkpoint), bench.words(WORD))
    painter = Painter(task.checkpoint, [METHODS["dco"](task.job(subject.name, task.extent.lengths[-1]))])
    named = bench.words(subject.token)
    plain = bench.record("dco", painter, named)
    rewarded = [
        bench.record("reward", painter, named, scale=scale, base_prompts=bench.words(WORD), reward_scales=(scale,))
        for scale in SLIDER
    ]
    return Taught(base, plain, rewarded)


def test_dco_teaches_a_character(taught):
    assert taught.plain.scores.subject > SUBJECT
    assert taught.plain.scores.parts > max(PARTS, taught.base.scores.parts + PARTS_GAIN)


def test_after_dco_the_rest_of_the_prompt_is_still_drawn(taught):
    assert taught.plain.scores.background > BACKGROUND
    assert taught.plain.scores.prompt > PROMPT


def test_the_reward_scale_is_a_slider_from_the_base_model_to_the_character(taught):
    subjects = [record.scores.subject for record in taught.rewarded]
    assert subjects[0] == pytest.approx(taught.base.scores.subject, abs=1e-3)
    assert all(after > before + SLIDER_STEP for before, after in zip(subjects, subjects[1:])), subjects


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """All that results.md is made of, measured anew."""
    return experiments.run(experiments.FULL, Files.committed(tmp_path_factory.mktemp("full")))


@pytest.mark.world_full
@pytest.mark.parametrize("method", METHODS)
def test_every_method_teaches_every_character_with_every_seed(records, method):
    for subject in experiments.FULL.subjects:
        last = chosen(records, base=MAIN_BASE, subject=subject, method=method, steps=experiments.FULL.lengths[-1])
        assert all(record.scores.subject > SUBJECT for record in last)
        assert all(record.scores.background > BACKGROUND for record in last)
    other = chosen(records, base=OTHER_BASE, method=method)
    assert other
    assert all(record.scores.subject > OTHER_BASE_SUBJECT for record in other)


@pytest.mark.world_full
def test_subject_fidelity_rises_with_the_reward_scale(records):
    for seed in experiments.FULL.seeds:
        assert rises([subject for subject, _ in results.reward_curve(records, experiments.FULL, seed)])


@pytest.mark.world_full
def test_two_loras_draw_a_subject_in_a_style(records):
    both = chosen(records, method="dco, both LoRAs")
    assert sum(record.scores.both for record in both) / len(both) > MERGED


@pytest.mark.world_full
def test_the_claims_that_reproduced_still_do(records):
    found = {claim.text: claim.verdict for claim in results.claims(records, experiments.FULL)}
    assert {text: found[text] for text in REPRODUCED} == dict.fromkeys(REPRODUCED, "reproduces")
