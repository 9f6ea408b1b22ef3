"""The stopping rules on series whose variances are known, and their states."""

import json
import math

import numpy as np
import pytest

from comfyui_personalize.models.dvar import PRESETS, PlateauStop, VarianceStop
from comfyui_personalize.models.errors import ConfigError


def values(stop, losses):
    return [stop.update(loss) for loss in losses]


def test_the_value_is_the_window_s_share_of_the_whole_variance():
    losses = np.exp(-np.arange(200) / 20) + 0.01 * np.random.default_rng(0).normal(size=200)
    stop = VarianceStop(30, 1e-9)
    expected = [1.0] * 30 + [losses[n - 30 : n].var() / losses[:n].var() for n in range(31, 201)]
    assert values(stop, losses.tolist()) == pytest.approx(expected, rel=1e-10)


def test_a_large_offset_costs_no_digits():
    losses = (np.random.default_rng(1).normal(size=500) * 1e-4).tolist()
    plain, shifted = values(VarianceStop(50, 0.1), losses), values(VarianceStop(50, 0.1), [x + 1e3 for x in losses])
    assert shifted == pytest.approx(plain, rel=1e-4)


def test_it_stops_strictly_below_the_threshold_and_stays_stopped():
    # The window (1, 0, 1) has the variance 2/9, and so has the history (0, 0, 1, 0, 1, ...) where they are equal:
    # (3, 1, 0, 1): mean 5/4, squares 11, variance 11/4 - 25/16 = 19/16; the window's share is (2/9) / (19/16) = 32/171.
    share = (2 / 9) / (19 / 16)
    for eps, stopped in ((share * (1 + 1e-12), True), (share * (1 - 1e-12), False)):
        stop = VarianceStop(3, eps)
        assert values(stop, [3, 1, 0, 1]) == [1, 1, 1, pytest.approx(share, rel=1e-14)]
        assert stop.stopped is stopped
    stop = VarianceStop(2, 0.5)
    values(stop, [4, 0, 0])
    assert stop.stopped and stop.value == 0
    assert stop.update(9) > 1 and stop.stopped


def test_constant_losses_converge_with_a_full_window_and_not_before():
    stop = VarianceStop(4, 0.2)
    assert values(stop, [0.1] * 3) == [1, 1, 1] and not stop.stopped
    assert stop.update(0.1) == 0 and stop.stopped and stop.constant


def test_a_flat_window_after_a_change_is_no_constant_run():
    stop = VarianceStop(3, 0.2)
    assert values(stop, [0.5, 0.1, 0.1]) == [1, 1, 1]
    assert stop.update(0.1) < 1e-30 and stop.stopped and not stop.constant


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out(loss):
    with_it, without = VarianceStop(3, 0.2), VarianceStop(3, 0.2)
    values(with_it, [3, loss, 1, 2, loss, 5])
    values(without, [3, 1, 2, 5])
    assert with_it.state_dict() == without.state_dict()


def test_differences_below_the_smallest_number_count_as_none():
    stop = VarianceStop(2, 0.2)
    assert values(stop, [0.0, 1e-200, 0.0]) == [1, 0, 0]


@pytest.mark.parametrize("done", [0, 1, 29, 30, 31, 90])
def test_a_state_goes_on_exactly(done):
    losses = np.random.default_rng(2).normal(size=100).tolist()
    whole, first, second = (VarianceStop(30, 0.9) for _ in range(3))
    expected = values(whole, losses)
    values(first, losses[:done])
    state = first.state_dict()
    second.load_state_dict(json.loads(json.dumps(state)))
    values(first, losses[done:])  # must not change the state that was taken
    assert values(second, losses[done:]) == expected[done:]
    assert second.state_dict() == whole.state_dict() == first.state_dict()


def test_memory_does_not_grow():
    stop = VarianceStop(5, 1e-9)
    values(stop, range(10_000))
    assert len(json.dumps(stop.state_dict())) < 300


@pytest.mark.parametrize(
    ("window", "eps", "message"),
    [
        (1, 0.1, "window must be at least 2"),
        (5, 0, "eps must be above 0"),
        (5, -0.1, "eps must be above 0"),
        (5, 1.1, "at most 1"),
        (5, math.nan, "eps must be above 0"),
    ],
)
def test_numbers_that_cannot_work_are_refused(window, eps, message):
    with pytest.raises(ConfigError, match=message):
        VarianceStop(window, eps)


def test_the_authors_numbers():
    numbers = {
        name: (preset.window, preset.eps, preset.short_steps, preset.full_steps) for name, preset in PRESETS.items()
    }
    assert numbers == {
        "textual inversion": (310, 0.15, 475, 6100),
        "custom diffusion": (180, 0.15, 367, 500),
        "dreambooth": (440, 0.4, 450, 1000),
    }
    assert [(p.clip_patience, p.clip_eps) for p in PRESETS.values()] == [(6, 0.02), (6, 0.02), (3, 0.04)]


def test_the_plateau_waits_one_check_longer_than_its_patience():
    stop = PlateauStop(2, 0.1)
    assert [stop.update(score) for score in (0.5, 0.55, 0.6, 0.59)] == [False, False, False, True]
    assert stop.best == 0.5  # small improvements do not add up
    assert stop.update(9.0) and stop.best == 0.5


def test_the_plateau_starts_again_after_an_improvement_and_from_its_state():
    first, second = PlateauStop(1, 0.1), PlateauStop(1, 0.1)
    assert not any(first.update(score) for score in (0.5, 0.4, 0.7, 0.6))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(0.75) and second.best == 0.7
    with pytest.raises(ConfigError, match="0 or more"):
        PlateauStop(-1, 0.1)
