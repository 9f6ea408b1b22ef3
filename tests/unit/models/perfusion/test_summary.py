"""What the text about concepts says."""

import json
from dataclasses import replace

import pytest
import torch

from comfyui_personalize.models.perfusion.summary import describe_company, describe_concept


def facts(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {name: value for name, value in rows}


def test_a_concept_tells_its_word_its_sizes_and_its_gate(make_concept):
    found = facts(describe_concept(make_concept(), 0.75, 0.25))
    assert found["word"] == "`<bear>`" and found["superclass"] == "teddy" and found["model family"] == "SD1.5"
    assert found["embedding vectors"] == "1 of 8 (clip_l)" and found["target input"] == "8 numbers"
    assert found["target outputs"] == "2 layers, 4 wide, one for all positions (paper)"
    assert found["keys"] == "the superclass's encoding, projected"
    # Target input and dual, superclass input, one row of the word, and two target outputs.
    assert found["numbers"].startswith("40, ")
    assert found["covariance"] == "`0123456789abcdef`"
    assert found["gate"] == "beta 0.75, tau 0.25: 73% open for its own word"  # σ(1)
    assert facts(describe_concept(make_concept(), 0.75, 0.25, True))["gate"].endswith("as far as it opens")
    assert found["training"] == "the file does not say"


def test_positions_and_stored_keys(make_concept):
    found = facts(describe_concept(make_concept(mode="positions", keys=True), 0.6, 0.15))
    assert found["target outputs"].endswith("one for each of 77 positions") and found["keys"] == "stored"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (json.dumps({"seed": 3, "steps": 400, "crop": "center"}), "steps 400, seed 3"),
        ("[" * 10**5, "the file does not say"),
        ("[1]", "the file does not say"),
        ("7", "the file does not say"),
    ],
)
def test_the_training_as_far_as_the_file_tells_it(make_concept, config, expected):
    concept = replace(make_concept(), metadata={"personalize.config": config}, superclass="", family=None)
    found = facts(describe_concept(concept, 0.6, 0.15))
    assert found["training"] == expected
    assert found["superclass"] == found["model family"] == "the file does not say"


def test_resemblance_is_what_the_gate_measures(make_concept):
    one, other = make_concept(seed=1), make_concept(trigger="<cup>", seed=2)
    half = replace(one, parts=replace(one.parts, target_input=one.parts.target_input / 2, dual=one.parts.dual / 2))
    table = describe_company([one, half, other]).splitlines()
    assert table[0] == "| resemblance | `<bear>` | `<bear>` | `<cup>` |"
    assert table[2].startswith("| `<bear>` | 1.00 | 2.00 |") and table[3].startswith("| `<bear>` | 0.50 | 1.00 |")
    seen = one.parts.target_input @ other.parts.dual / (other.parts.target_input @ other.parts.dual)
    assert table[2].endswith(f" {seen:.2f} |") and table[4].endswith(" 1.00 |")


def test_concepts_that_do_not_go_together_are_named(make_concept):
    one = make_concept()
    other = replace(make_concept(trigger="<cup>"), covariance="fedcba9876543210")
    assert "different covariances: `<bear>` with `0123456789abcdef`, `<cup>` with" in describe_company([one, other])
    wide = make_concept(dim=16, trigger="<cup>")
    assert "different model families" in describe_company([one, wide])
    assert torch.isfinite(wide.parts.dual).all()
