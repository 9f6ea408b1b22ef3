"""The report on Perfusion, on made-up measurements."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import results_perfusion as results  # noqa: E402 - lies in the folder that was just added
from concept_experiments import (  # noqa: E402
    ALIKE,
    ALONE,
    BETAS,
    GATE,
    GATED_REMOVAL,
    LOCKED,
    LORA,
    PAIR,
    WORDS,
    Drawn,
    Gates,
    Measured,
)
from experiments import BASE_DESCRIPTION, BASE_WORD  # noqa: E402
from pair_scores import PairScores  # noqa: E402
from scores import Scores  # noqa: E402

SUBJECT = {BASE_WORD: 0.0, BASE_DESCRIPTION: 0.1, WORDS: 0.2, LORA: 0.5, LOCKED: 0.3}
SUBJECT |= {GATE.format(beta): 0.6 - 0.1 * number for number, beta in enumerate(BETAS)}
SUBJECT |= {GATED_REMOVAL.format(beta): 0.55 - 0.1 * number for number, beta in enumerate(BETAS)}


@pytest.fixture
def found():
    """Two seeds in which a concept is better than anything."""
    drawn, gates = [], []
    pictures = torch.full((15, 3, 64, 64), 0.5)
    words = tuple(f"a <zib> number {number}" for number in range(15))
    for seed in (0, 1):
        for method, share in SUBJECT.items():
            scores = Scores(share, share, 0.9, 0.9, 0.9, share)
            drawn.append(Drawn(method, seed, (ALONE,), scores, words, pictures))
            for pair in (PAIR, ALIKE):
                drawn.append(Drawn(method, seed, pair, PairScores(share, 0.1, share), words, pictures))
        gates += [Gates(seed, pair, 0.04, [[1.1, 0.0], [0.0, 0.9]], 0.2) for pair in (PAIR, ALIKE)]
    return Measured((0, 1), drawn, gates)


def test_claims_follow_the_numbers(found):
    assert [line.count("**reproduces**") for line in results.claims(found)] == [1, 1, 1, 1]
    turned = {GATE.format(BETAS[0]): WORDS, WORDS: GATE.format(BETAS[0])}
    swapped = [Drawn(turned.get(d.method, d.method), *list(vars(d).values())[1:]) for d in found.drawn]
    lines = results.claims(Measured(found.seeds, swapped, found.gates))
    assert all("**does not reproduce**" in line for line in lines)


def test_the_report_has_every_number_and_its_sheets_are_small(found, tmp_path):
    text = results.report(found, 12, 300)
    assert "in 12 minutes" in text
    assert f"| {LORA} | 0.50 ± 0.00 |" in text
    assert "| zib and kro | 0 | 1.10 | 0.00 | 0.00 | 0.90 | 0.20 | 0.04 |" in text
    named = {line.split("(results/")[1].rstrip(")") for line in text.splitlines() if "(results/" in line}
    for name, sheet in results.sheets(found).items():
        path = tmp_path / f"{name}.jpg"
        results.save_sheet(sheet, path)
        assert path.stat().st_size <= 150_000
        named.remove(path.name)
    assert not named
