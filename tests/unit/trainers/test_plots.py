"""The loss curve: what is drawn can be found again by its colour."""

import math

import pytest

from comfyui_personalize.trainers.plots import loss_curve

ORANGE = (230, 120, 20)
BLUE = (21, 101, 192)


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


@pytest.mark.parametrize("losses", [[], [1.0], [0.5] * 9, [1.0, math.nan, 2.0]])
def test_odd_histories_are_drawn_too(losses):
    assert loss_curve(losses, [(0, 0.7)] if losses else ()).size == (768, 432)
