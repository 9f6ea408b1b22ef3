"""What becomes of the numbers: shares, spreads, curves, verdicts and the report, on made-up measurements."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import experiments  # noqa: E402 - lies in the folder that was just added
import results  # noqa: E402
from experiments import BASE_DESCRIPTION, BASE_WORD, FULL, MAIN_BASE, OTHER_BASE, REWARD_SCALE, Record  # noqa: E402
from methods import METHODS  # noqa: E402
from prompts import Prompt, in_style, suitable  # noqa: E402
from scenes import BACKGROUNDS, Shape  # noqa: E402
from scorer import HEADS, Reading, targets_of  # noqa: E402
from scores import (  # noqa: E402
    Scores,
    Spread,
    common_levels,
    gain_at_equal_subject,
    prompt_at,
    rises,
    scores_of,
    verdict,
)
from subjects import SUBJECTS, WORD  # noqa: E402

ZIB = SUBJECTS["zib"]


def reading_of(scenes, sure=0.9):
    """A Reading that is right and this sure of everything that the scenes decide, and knows nothing else."""
    probabilities = {name: torch.full((len(scenes), len(classes)), 1 / len(classes)) for name, classes in HEADS.items()}
    for picture, scene in enumerate(scenes):
        for name, target in targets_of(scene).items():
            row = probabilities[name][picture]
            row[:] = (1 - sure) / (len(row) - 1)
            row[target] = sure
    return Reading(probabilities)


def test_what_was_asked_for_scores_full_marks():
    prompts = [
        Prompt("in the snow", "on the left", Shape("star", "red")),
        Prompt("at night", "on the right", Shape("ring", "blue")),
        Prompt("in a room", style="neon"),
        Prompt("in a forest"),
    ]
    scores = scores_of(reading_of([prompt.scene(ZIB.looks) for prompt in prompts]), prompts, ZIB)
    assert (scores.background, scores.second, scores.style, scores.prompt, scores.both) == (1, 1, 1, 1, 1)
    assert scores.parts == 1
    assert scores.subject == pytest.approx(0.81, abs=0.05)  # a creature, and this one


def test_each_mistake_costs_its_own_score():
    star = Prompt("in the snow", "on the left", Shape("star", "red"))
    neon = Prompt("in a room", style="neon")
    asked = [star, star, neon, neon]
    shown = [
        replace(star, other=Shape("star", "orange")).scene(ZIB.looks),
        star.scene(SUBJECTS["mok"].looks),
        replace(neon, style="flat").scene(ZIB.looks),
        replace(neon, background="on a beach").scene(ZIB.looks),
    ]
    scores = scores_of(reading_of(shown), asked, ZIB)
    assert (scores.second, scores.style, scores.background, scores.both) == (0.5, 0.5, 0.75, 0.5)
    assert scores.prompt == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    assert scores.subject < 0.7
    assert scores.parts < 1


def test_what_no_prompt_asks_for_does_not_count():
    prompts = [Prompt(background) for background in BACKGROUNDS]
    scores = scores_of(reading_of([prompt.scene(ZIB.looks) for prompt in prompts]), prompts, ZIB)
    assert (scores.second, scores.style, scores.prompt) == (None, None, 1)


def test_a_spread_is_mean_and_deviation_over_seeds():
    assert str(Spread.of([0.5, 0.6, 0.7])) == "0.60 ± 0.10"
    assert Spread.of([0.5]) == Spread(0.5, 0.0)


def test_a_claim_reproduces_with_all_seeds_or_not_at_all():
    assert verdict([True, True, True]) == "reproduces"
    assert verdict([True, False, True]) == "is not clear, the seeds disagree"
    assert verdict([False, False, False]) == "does not reproduce"


def test_only_what_never_stays_rises():
    assert rises([0.1, 0.2, 0.9])
    assert not rises([0.1, 0.2, 0.2])


def test_curves_are_compared_where_their_subject_fidelities_are_equal():
    better = [(0.0, 1.0), (0.4, 0.9), (0.8, 0.8)]
    worse = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.3)]
    assert prompt_at(better, 0.6) == pytest.approx(0.85)
    assert prompt_at(worse, 0.25) == pytest.approx(0.75)
    assert common_levels(better, worse)[0] == pytest.approx(0.4)
    assert common_levels(better, worse)[-1] == 0.8
    # At 0.4 they are 0.9 and 0.6, at 0.5 0.875 and 0.5, at 0.8 0.8 and 0.38, straight in between; eleven levels.
    gains = [0.3, 0.33, 0.36, 0.3725, 0.3825, 0.3875 + 0.0025, 0.395, 0.4, 0.405, 0.4125, 0.42]
    assert gain_at_equal_subject(better, worse) == pytest.approx(sum(gains) / 11, abs=0.01)
    assert gain_at_equal_subject(worse, better) == pytest.approx(-gain_at_equal_subject(better, worse))
    assert gain_at_equal_subject(better, better) == 0


def test_a_curve_counts_from_where_it_first_arrives():
    overtrained = [(0.0, 1.0), (0.6, 0.8), (0.5, 0.2)]
    assert prompt_at(overtrained, 0.5) == pytest.approx(1 - 0.2 * 0.5 / 0.6)
    with pytest.raises(ValueError, match="below a subject fidelity of 0.700"):
        prompt_at(overtrained, 0.7)


@pytest.fixture
def records():
    """A full measurement in which dco does what its paper says."""
    made = []

    def add(base, subject, seed, method, share, *, steps=0, scale=None, style="", kept=0.9):
        looks = SUBJECTS[subject].looks
        prompts = suitable(FULL.prompts, looks)
        prompts = in_style(prompts, style) if style else prompts
        words = tuple(prompt.naming(SUBJECTS[subject].token) for prompt in prompts)
        pictures = np.full((len(words), 64, 64, 3), int(share * 255), np.uint8)
        second = None if style else kept
        scores = Scores(share, share, kept, second, kept, share * kept + seed / 100)
        made.append(Record(base, subject, seed, method, steps, scale, style, steps / 10, scores, words, pictures))

    for seed in FULL.seeds:
        for subject in FULL.subjects:
            for base in (MAIN_BASE, OTHER_BASE) if subject == FULL.subjects[0] else (MAIN_BASE,):
                add(base, subject, seed, BASE_WORD, 0.0, kept=1.0)
                add(base, subject, seed, BASE_DESCRIPTION, 0.2, kept=0.95)
                for method in METHODS:
                    for steps in FULL.lengths if base == MAIN_BASE else FULL.lengths[-1:]:
                        share = 0.9 * steps / FULL.lengths[-1]
                        kept = 1 - (0.2 if method == "dco" else 0.5) * share
                        add(base, subject, seed, method, share, steps=steps, kept=kept)
                for scale in FULL.scales if base == MAIN_BASE else (REWARD_SCALE,):
                    label = experiments.rewarded_label(scale)
                    add(base, subject, seed, label, scale / 5, steps=FULL.lengths[-1], scale=scale, kept=0.99)
            for style in FULL.styles:
                for method, share in zip(METHODS, (0.4, 0.7), strict=True):
                    add(MAIN_BASE, subject, seed, f"{method}, subject's LoRA alone", 0.1, steps=1, style=style)
                    add(MAIN_BASE, subject, seed, f"{method}, both LoRAs", share, steps=1, style=style)
    return made


def test_claims_follow_the_numbers(records):
    assert [claim.verdict for claim in results.claims(records, FULL)] == ["reproduces"] * 5
    turned = {"dco": "dreambooth_lora", "dreambooth_lora": "dco"}
    swapped = [
        replace(record, method=", ".join(turned.get(word, word) for word in record.method.split(", ")))
        if "reward" not in record.method
        else replace(record, scores=replace(record.scores, subject=1 - record.scores.subject))
        for record in records
    ]
    equal, _, slider, merges, better = results.claims(swapped, FULL)
    assert [claim.verdict for claim in (equal, slider, better)] == ["does not reproduce"] * 3
    assert merges.verdict == "reproduces"


def test_one_seed_that_disagrees_is_said(records):
    for place, record in enumerate(records):
        if record.seed == 1 and record.method == experiments.rewarded_label(FULL.scales[-1]):
            records[place] = replace(record, scores=replace(record.scores, subject=0.0))
    assert results.slider(records, FULL).verdict == "is not clear, the seeds disagree"


def test_the_report_has_every_number_and_its_sheets_are_small(records, tmp_path):
    text = results.report(records, FULL, minutes=12)
    assert "in 12 minutes" in text
    assert "A trial" not in text
    assert f"| dco | {FULL.lengths[-1]} | 0.90 ± 0.00 |" in text
    assert f"| {BASE_WORD} | 0.00 ± 0.00 |" in text
    assert "| dco, both LoRAs | 0.64 ± 0.01 | 0.70 ± 0.00 |" in text
    assert text.count("**reproduces**") == 10, "in the list of claims and in their sections"
    named = {line.split("(results/")[1].rstrip(")") for line in text.splitlines() if "(results/" in line}
    for name, sheet in results.sheets(records, FULL).items():
        path = tmp_path / f"{name}.jpg"
        results.save_sheet(sheet, path)
        assert path.stat().st_size <= results.MAX_SHEET_BYTES
        named.remove(path.name)
    assert not named


def test_a_trial_says_that_it_is_one(records):
    assert "**A trial" in results.report(records, FULL, minutes=1, trial=True)


def test_names_are_read_by_people():
    assert results.listed(["zib"]) == "zib"
    assert results.listed(["zib", "mok"]) == "zib and mok"
    assert WORD in Prompt("at night").naming(WORD)


def test_the_committed_report_explains_what_did_not_reproduce():
    page = (Path(__file__).resolve().parent / "results.md").read_text(encoding="utf-8")
    claims = [line for line in page.splitlines() if line.startswith("- ") and "**" in line]
    assert len(claims) == 5 and sum("**reproduces**" in line for line in claims) == 3
    for line in claims:
        assert line.endswith(").") == ("**reproduces**" in line), line
    assert results.UNEXPLAINED not in page
    assert all(f"{text}: **" in page for text in results.EXPLANATIONS)
