"""The loss curve and the scores: what is drawn can be found again by its colour."""

import math

import pytest

from comfyui_personalize.trainers.plots import compared_curves, loss_curve, score_chart
from comfyui_personalize.trainers.run_log import LoggedRun
from comfyui_personalize.trainers.stopping import Criterion

ORANGE = (230, 120, 20)
BLUE = (21, 101, 192)
GREEN, VIOLET, RED = (46, 125, 50), (142, 36, 170), (198, 40, 40)


def places(image, colour):
    return [
        (x, y) for x in range(image.width) for y in range(40, image.height - 52) if image.getpixel((x, y)) == colour
    ]


def test_evaluations_are_drawn_where_they_were_made():
    losses = [1 / step for step in range(1, 201)]
    plain = loss_curve(losses)
    assert places(plain, BLUE) and not places(plain, ORANGE)
    drawn = places(loss_curve(losses, [(steps, 0.5) for steps in range(0, 101, 5)]), ORANGE)
    middle = 78 + (768 - 20 - 78) / 2
    assert min(x for x, _ in drawn) == pytest.approx(78, abs=2) and max(x for x, _ in drawn) == pytest.approx(
        middle, abs=4
    )
    assert max(y for _, y in drawn) - min(y for _, y in drawn) < 4  # they do not change


def test_evaluations_above_all_losses_stay_in_the_picture():
    image = loss_curve([0.1] * 50, [(steps, 3 - steps / 50) for steps in range(0, 50, 5)])
    assert len({y for _, y in places(image, ORANGE)}) > 80


def test_a_rule_has_a_panel_with_its_threshold_and_the_step_at_which_it_stopped():
    values = [(steps, 1 - steps / 100) for steps in range(0, 81, 4)]
    image = loss_curve([1 / step for step in range(1, 101)], (), Criterion("dvar", values, 0.25, 80))
    assert image.size == (768, 720)
    curve = places(image, GREEN)
    assert min(y for _, y in curve) > 432 and max(y for _, y in curve) - min(y for _, y in curve) > 100
    assert len({y for _, y in places(image, VIOLET) if y > 480}) <= 3  # below its name
    stop = round(78 + (768 - 20 - 78) * 79 / 99)
    assert all(RED in {image.getpixel((x, y)) for x in range(stop - 2, stop + 3)} for y in (60, 300, 500, 650))
    assert max(x for x, _ in places(image, RED)) <= stop + 2
    running = loss_curve([0.1] * 9, (), Criterion("clip", [(3, 0.5)], None))
    assert not places(running, RED) and not places(running, VIOLET) and places(running, GREEN)
    assert loss_curve([0.1] * 9, (), Criterion()).size == (768, 432)


def test_compared_runs_end_where_they_ended_and_none_hides_another():
    course = [1 / step for step in range(1, 101)]
    runs = {"whole": LoggedRun(course, []), "half": LoggedRun(course[:50], [(0, 0.9), (48, 0.9)])}
    image = compared_curves(runs)
    whole, half = places(image, BLUE), places(image, ORANGE)
    middle = round(78 + (768 - 20 - 78) * 49 / 99)
    below = [(x, y) for x, y in half if y > 200]  # its name stands above
    assert max(x for x, _ in whole) >= 746 and middle <= max(x for x, _ in below) <= middle + 7
    column = {y for x, y in whole if x == 120}, {y for x, y in half if x == 120}
    assert all(column) and max(column[0]) - min(column[0]) < 12  # the wider line shows beside the other
    assert min(column[0]) < min(column[1]) or max(column[0]) > max(column[1])
    assert compared_curves({"odd": LoggedRun([math.nan], [(0, math.inf)])}).size == (768, 432)


@pytest.mark.parametrize("losses", [[], [1.0], [0.5] * 9, [1.0, math.nan, 2.0]])
def test_odd_histories_are_drawn_too(losses):
    assert loss_curve(losses, [(0, 0.7)] if losses else ()).size == (768, 432)


def test_scores_are_points_above_their_images_and_a_line_at_their_mean():
    image = score_chart({"CLIP-I": [0.2, 0.8, 0.5], "face": [None, 0.0, None]})
    height, bottom = 432 - 52 - 44, 432 - 52
    for column, value in enumerate([0.2, 0.8, 0.5]):
        x, y = 78 + (768 - 20 - 78) * column / 2, bottom - height * value
        assert image.getpixel((min(round(x), 767), round(y))) == BLUE
    assert image.getpixel((250, round(bottom - height * 0.5))) == BLUE  # between the points
    assert image.getpixel((413, bottom)) == ORANGE
    assert not [x for x, y in places(image, ORANGE) if y < bottom - 5]


def test_scores_below_zero_stay_in_the_picture():
    lowest = max(y for _, y in places(score_chart({"CLIP-T": [-0.5, 0.1]}), BLUE))
    assert lowest == pytest.approx(432 - 52, abs=5)


@pytest.mark.parametrize("series", [{}, {"face": []}, {"face": [None, None]}, {"DINO": [0.4]}, {"DINO": [0.4] * 500}])
def test_odd_scores_are_drawn_too(series):
    assert score_chart(series).size == (768, 432)
