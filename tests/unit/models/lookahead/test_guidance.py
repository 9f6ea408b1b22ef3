"""Properties of guidance with separate scales for text and identity."""

import math

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.lookahead import (
    few_step_weights,
    guidance_weights,
    lookahead_guidance,
    plain_weights,
)

ROWS = ("plain_uncond", "plain_text", "shared_uncond", "shared_text")


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return {row: torch.randn(2, 4, 6, 5, generator=generator) for row in ROWS}


def numbers(*values):
    return {row: torch.full((1, 1, 1, 1), float(value)) for row, value in zip(ROWS, values)}


def test_numbers_worked_out_by_hand():
    # 1 + 2·(3 - 1) + 10·(6 - 1) + 100·(4 - 1) = 355
    guided = lookahead_guidance(numbers(1, 3, 4, 6), guidance_weights(2, 10, 100))
    assert guided.item() == pytest.approx(355)


def test_without_identity_it_is_plain_guidance(predictions):
    weights = guidance_weights(7.5, 0, 0)
    assert weights == plain_weights(7.5)
    uncond, text = predictions["plain_uncond"], predictions["plain_text"]
    torch.testing.assert_close(lookahead_guidance(predictions, weights), uncond + 7.5 * (text - uncond))


@pytest.mark.parametrize("scales", [(3, 2, 2), (0.5, 0.25, -1), (0, 0, 0), (0.1, 0.2, 0.7)])
def test_the_weights_sum_to_one(scales, predictions):
    weights = guidance_weights(*scales)
    assert sum(weights.values()) == pytest.approx(1)
    same = dict.fromkeys(ROWS, predictions["plain_text"])
    torch.testing.assert_close(lookahead_guidance(same, weights), predictions["plain_text"])


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        (guidance_weights(3, 2, 2), set(ROWS)),
        (guidance_weights(3, 2, 0), {"plain_uncond", "plain_text", "shared_text"}),
        (guidance_weights(0, 2, 0), {"plain_uncond", "shared_text"}),
        (guidance_weights(0, 1, 0), {"shared_text"}),
        (guidance_weights(0, 5, -4), {"shared_text", "shared_uncond"}),
        (guidance_weights(0.1, 0.2, 0.7), {"plain_text", "shared_text", "shared_uncond"}),
        (guidance_weights(0, 0, 0), {"plain_uncond"}),
        (plain_weights(5), {"plain_uncond", "plain_text"}),
        (plain_weights(1), {"plain_text"}),
        (few_step_weights(sharing=True), {"shared_text"}),
        (few_step_weights(sharing=False), {"plain_text"}),
    ],
)
def test_only_rows_that_count_are_needed(weights, rows, predictions):
    assert weights.keys() == rows
    lookahead_guidance({row: predictions[row] for row in rows}, weights)


def test_a_single_row_is_passed_on_as_it_is(predictions):
    assert lookahead_guidance(predictions, few_step_weights(sharing=True)) is predictions["shared_text"]


def test_the_formula_commutes_with_a_change_of_parametrization(predictions):
    # Noise ε -> denoised (x - σε), affine with equal weights for all predictions.
    x, sigma, weights = torch.randn(2, 4, 6, 5), 3.0, guidance_weights(3, 2, 2)
    denoised = {row: x - sigma * value for row, value in predictions.items()}
    expected = x - sigma * lookahead_guidance(predictions, weights)
    torch.testing.assert_close(lookahead_guidance(denoised, weights), expected, rtol=1e-4, atol=1e-4)


def test_a_missing_prediction_is_named(predictions):
    del predictions["shared_uncond"]
    with pytest.raises(ConfigError, match=r"needs the predictions \['shared_uncond'\]"):
        lookahead_guidance(predictions, guidance_weights(3, 2, 2))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_that_are_no_numbers_are_refused(scale):
    with pytest.raises(ConfigError, match="finite"):
        guidance_weights(3, scale, 2)
