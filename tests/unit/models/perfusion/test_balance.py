"""The rule that chooses a gate."""

import itertools
import math

import pytest

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.perfusion.balance import (
    BETAS,
    TAUS,
    Trial,
    balance_table,
    balances,
    choose,
    pareto_front,
    read_values,
)


def trials(*scores):
    """Trials of rising beta with these pairs of likeness and faithfulness."""
    return [Trial(0.5 + 0.1 * place, 0.15, *pair) for place, pair in enumerate(scores)]


def test_the_front_is_what_nothing_beats():
    found = trials((0.9, 0.1), (0.7, 0.2), (0.6, 0.15), (0.5, 0.3), (0.5, 0.25))
    assert pareto_front(found) == [0, 1, 3]
    assert pareto_front(found[::-1]) == [4, 3, 1]
    twins = trials((0.5, 0.3), (0.5, 0.3))
    assert pareto_front(twins) == [0, 1]


def test_the_most_balanced_of_the_front_is_chosen():
    found = trials((0.9, 0.1), (0.8, 0.25), (0.6, 0.28), (0.5, 0.3))
    # likeness scaled: 1, .75, .25, 0; faithfulness: 0, .75, .9, 1.
    assert balances(found) == pytest.approx([0, 0.75, 2 * 0.25 * 0.9 / 1.15, 0])
    assert choose(found) == 1


def test_a_beaten_trial_is_never_chosen():
    for scores in itertools.product((0.1, 0.2, 0.3), repeat=4):
        found = trials(scores[:2], scores[2:], (0.15, 0.25))
        assert choose(found) in pareto_front(found)


def test_scale_and_order_do_not_matter():
    found = trials((0.9, 0.1), (0.8, 0.25), (0.6, 0.28))
    larger = [Trial(one.beta, one.tau, 3 * one.likeness - 1, 100 * one.faithfulness) for one in found]
    assert choose(larger) == choose(found)
    assert found[::-1][choose(found[::-1])] == found[choose(found)]


def test_ties_go_to_the_lower_beta_and_then_tau():
    assert choose(trials((0.9, 0.1), (0.5, 0.3))) == 0
    even = [Trial(0.7, 0.1, 0.5, 0.3), Trial(0.6, 0.2, 0.5, 0.3), Trial(0.6, 0.1, 0.5, 0.3)]
    assert choose(even) == 2 and balances(even) == [1, 1, 1]


def test_a_score_that_never_changes_leaves_the_choice_to_the_other():
    assert choose(trials((0.5, 0.1), (0.5, 0.3), (0.5, 0.2))) == 1


def test_the_table_names_the_front_and_the_choice():
    table = balance_table(trials((0.9, 0.1), (0.8, 0.25), (0.7, 0.2), (0.5, 0.3))).splitlines()
    assert table[3] == "| 0.6 | 0.15 | 0.8000 | 0.2500 | 0.7500 | chosen |"
    assert [row.split("|")[-2].strip() for row in table[2:]] == ["front", "chosen", "", "front"]
    assert len({row.count("|") for row in table}) == 1


@pytest.mark.parametrize("scores", [(math.nan, 0.1), (0.1, math.inf)])
def test_scores_that_are_no_numbers_are_refused(scores):
    with pytest.raises(ConfigError, match="beta 0.5 and tau 0.15 have no score"):
        choose(trials(scores, (0.5, 0.3)))


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(ConfigError, match="no gate to choose from"):
        choose([])


def test_values_are_read_in_any_order_and_once():
    assert read_values("0.7, 0.6\n0.6 ;-1", "betas", BETAS) == [-1, 0.6, 0.7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "betas: '' is no number"),
        ("0.5, high", "betas: 'high' is no number"),
        ("nan", "betas: nan is out of range"),
        ("inf", "betas: inf is out of range; it goes from -2 to 4"),
        ("0.6, 4.1", "betas: 4.1 is out of range"),
    ],
)
def test_values_that_no_gate_takes_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        read_values(text, "betas", BETAS)


def test_a_temperature_is_positive():
    with pytest.raises(ConfigError, match="taus: 0 is out of range"):
        read_values("0", "taus", TAUS)
