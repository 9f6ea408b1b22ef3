"""Properties of the start from the superclass and of the moving average."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, DatasetError
from comfyui_personalize.models.perfusion import (
    concept_encoding,
    concept_row,
    moved_target_input,
    superclass_input,
)

ENCODINGS = torch.arange(24.0).reshape(2, 4, 3)


def test_the_row_counts_the_start_token():
    assert concept_row([49406, 320, 1125, 49408, 49407], 49408) == 3
    with pytest.raises(DatasetError, match="does not contain"):
        concept_row([49406, 320, 49407], 49408)


def test_each_caption_has_a_row_of_its_own():
    # Rows 1 and 3: (3, 4, 5) and (21, 22, 23), whose mean is (12, 13, 14).
    assert concept_encoding(ENCODINGS, torch.tensor([1, 3])).tolist() == [12, 13, 14]


def test_the_average_moves_by_its_decay():
    moved = moved_target_input(torch.zeros(3), ENCODINGS, torch.tensor([1, 3]), decay=0.75)
    assert moved.tolist() == [3, 3.25, 3.5]
    assert moved_target_input(torch.ones(3), ENCODINGS, torch.tensor([0, 0]), decay=1.0).tolist() == [1, 1, 1]


def test_half_precision_encodings_do_not_round_the_average():
    # 0.99 + 0.01 · 1.0078125 lies between two bfloat16 numbers.
    encodings = torch.full((1, 1, 1), 1.0078125, dtype=torch.bfloat16)
    moved = moved_target_input(torch.ones(1), encodings, torch.tensor([0]))
    assert moved.dtype == torch.float32 and moved.item() == pytest.approx(1.000078125, abs=1e-7)


def test_no_gradient_reaches_the_encodings():
    encodings = ENCODINGS.clone().requires_grad_()
    rows = torch.tensor([1, 3])
    assert not moved_target_input(torch.zeros(3), encodings, rows).requires_grad
    assert not superclass_input(encodings, rows, "paper").requires_grad
    assert not superclass_input(encodings, rows, "positions").requires_grad


def test_the_two_modes_of_target_outputs():
    rows = torch.tensor([1, 1])
    each = superclass_input(ENCODINGS, rows, "positions")
    assert torch.equal(each, ENCODINGS.mean(dim=0))
    assert torch.equal(superclass_input(ENCODINGS, rows, "paper"), each[1:2])
    with pytest.raises(ConfigError, match="'paper' or 'positions'"):
        superclass_input(ENCODINGS, rows, "all")
