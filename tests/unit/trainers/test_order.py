"""Shuffled passes meet every example once, resume exactly, and do not depend on the number of ranks."""

import json

import pytest
import torch

from comfyui_personalize.models.errors import DatasetError
from comfyui_personalize.trainers.order import BatchOrder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_pass_meets_every_example_once_across_batches():
    order, draws = BatchOrder(7), generator()
    met = [draw.example for _ in range(7) for draw in order.next_batch(3, draws)]
    assert [sorted(met[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert met[:7] != met[7:14]


def test_a_batch_larger_than_the_dataset_repeats_it():
    batch = BatchOrder(2).next_batch(6, generator())
    assert sorted(draw.example for draw in batch) == [0, 0, 0, 1, 1, 1]


def test_order_follows_the_generator():
    assert BatchOrder(50).next_batch(50, generator(1)) == BatchOrder(50).next_batch(50, generator(1))
    assert BatchOrder(50).next_batch(50, generator(1)) != BatchOrder(50).next_batch(50, generator(2))


def test_class_examples_are_paired_and_also_met_once_a_pass():
    batch = BatchOrder(2, 6).next_batch(6, generator())
    assert sorted(draw.class_example for draw in batch) == list(range(6))
    assert all(draw.class_example is None for draw in BatchOrder(2).next_batch(4, generator()))


def test_epoch_counts_passes():
    order, draws = BatchOrder(4), generator()
    counts = []
    for _ in range(6):
        counts.append(order.epoch)
        order.next_batch(2, draws)
    assert counts == [0, 0.5, 1, 1.5, 2, 2.5]


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("steps_before", [0, 1, 3, 7])
def test_resuming_continues_bit_for_bit(classes, steps_before):
    whole, draws = BatchOrder(5, classes), generator(9)
    for _ in range(steps_before):
        whole.next_batch(2, draws)
    state, rng = json.loads(json.dumps(whole.state_dict())), draws.get_state()
    expected = [whole.next_batch(2, draws) for _ in range(12)]

    resumed, other = BatchOrder(5, classes), generator(123)
    resumed.next_batch(1, other)
    resumed.load_state_dict(state)
    other.set_state(rng)
    assert [resumed.next_batch(2, other) for _ in range(12)] == expected


def test_state_is_a_copy():
    order, draws = BatchOrder(3), generator()
    order.next_batch(1, draws)
    state = order.state_dict()
    before = json.dumps(state)
    order.next_batch(5, draws)
    assert json.dumps(state) == before


@pytest.mark.parametrize(("examples", "classes", "named"), [(6, 0, "examples"), (5, 3, "class examples")])
def test_state_of_another_dataset_is_refused_and_changes_nothing(examples, classes, named):
    order = BatchOrder(5)
    order.next_batch(2, generator())
    before = order.state_dict()
    with pytest.raises(DatasetError, match=f"{named}, the dataset has"):
        order.load_state_dict(BatchOrder(examples, classes).state_dict())
    assert order.state_dict() == before


def test_empty_datasets_are_errors():
    with pytest.raises(DatasetError, match="no pictures"):
        BatchOrder(0)
