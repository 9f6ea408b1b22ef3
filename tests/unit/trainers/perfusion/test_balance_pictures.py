"""The sweep's contact sheet and chart."""

import numpy as np
import pytest
from PIL import Image

from comfyui_personalize.models.perfusion.balance import Trial
from comfyui_personalize.trainers.perfusion.balance_pictures import contact_sheet, front_chart

ORANGE = (230, 120, 20)
TRIALS = [Trial(0.5, 0.1, 0.8, 0.2), Trial(0.6, 0.15, 0.75, 0.28), Trial(0.8, 0.2, 0.6, 0.3), Trial(0.7, 0.1, 0.6, 0.2)]
COLOURS = [(40, 200, 40), (40, 40, 200), (200, 40, 200), (0, 160, 160)]


def where(image, colour):
    """Rows and columns that show a colour."""
    return np.nonzero((np.asarray(image) == colour).all(axis=-1))


def sheet_of(chosen, size=(64, 48), each=2):
    rows = [[Image.new("RGB", size, colour)] * (2 * each) for colour in COLOURS]
    return contact_sheet(rows, TRIALS, chosen, ["a teddy", "a teddy that " + "walks and " * 30])


def test_a_row_for_each_gate_and_the_chosen_one_is_framed():
    sheet = sheet_of(chosen=1)
    tops = [where(sheet, colour)[0].min() for colour in COLOURS]
    assert tops == sorted(tops) and len(where(sheet, COLOURS[0])[0]) == 4 * 64 * 48
    framed = where(sheet, ORANGE)[0]
    assert tops[1] - 4 <= framed.min() <= framed.max() < tops[2]
    assert not np.array_equal(sheet, sheet_of(chosen=2))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2048, 2048)])
def test_pictures_of_any_size_fit(size):
    assert sheet_of(0, size, each=1).width < 2000


def test_the_chart_shows_every_trial_and_the_choice():
    chart = front_chart(TRIALS, 1)
    assert chart.size == (768, 512)
    assert len(where(chart, ORANGE)[0]) > 150
    assert not np.array_equal(chart, front_chart(TRIALS, 0))


@pytest.mark.parametrize("trials", [TRIALS[:1], [TRIALS[0]] * 3])
def test_trials_that_are_all_alike_are_drawn(trials):
    assert len(where(front_chart(trials, 0), ORANGE)[0]) > 150
