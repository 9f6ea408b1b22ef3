"""Masks, settings and covariances that no training can use: one sentence each, and nothing is left behind."""

import math

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, DatasetError, FormatError
from comfyui_personalize.models.perfusion import read_covariance, write_covariance
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.perfusion.config import PerfusionConfig

WIDE = torch.rand(40, 120, 3)


def masked(*masks):
    """A dataset of wide pictures with these masks."""
    return Dataset.from_tensors(
        [WIDE] * len(masks), "a <teddy>", masks=list(masks), tokens=[LearnedToken("<teddy>", "teddy")]
    )


def at_the_edge():
    """White where a square from the middle of a wide picture does not reach."""
    mask = torch.zeros(40, 120)
    mask[:, :20] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(40, 120), "mask 2: the mask is black everywhere"),
        (torch.full((40, 120), 0.001), "mask 2: the mask is black everywhere"),
        (torch.full((40, 120), math.nan), "mask 2 contains NaN"),
        (torch.ones(120, 40), "mask 2: the mask is 40 x 120 pixels, its picture image 2 is 120 x 40"),
    ],
    ids=["black", "nearly black", "NaN", "another shape"],
)
def test_masks_that_are_none_are_refused_with_the_dataset(mask, message):
    with pytest.raises(DatasetError) as refused:
        masked(None, mask)
    assert message in str(refused.value)


def test_a_subject_outside_the_cut_is_refused_and_nothing_is_written(tiny):
    with pytest.raises(DatasetError, match="image 1: the mask is all black"):
        tiny.train(dataset=masked(at_the_edge()), crop="center")
    assert not tiny.place().lora_path.exists()


def test_a_superclass_of_more_tokens_than_the_word_has_rows_is_refused(tiny):
    dataset = Dataset.from_tensors([WIDE], "a <teddy>", tokens=[LearnedToken("<teddy>", "teddy bear")])
    with pytest.raises(ConfigError, match="'teddy bear', which has 2 tokens.*give it 2 rows, or a shorter"):
        tiny.train(dataset=dataset, steps=1)
    assert not tiny.place().lora_path.exists()


def test_a_picture_without_a_mask_counts_whole(tiny):
    result = tiny.train(dataset=masked(None, torch.ones(40, 120)), steps=1)
    assert len(result.train.losses) == 1 and math.isfinite(result.train.losses[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": -0.1}, "tau must be positive"),
        ({"tau": math.nan}, "tau"),
        ({"beta": math.inf}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"ema_decay": 1.0}, "ema_decay must be from 0 up to, not including, 1"),
        ({"embedding_learning_rate": 0.0}, "embedding_learning_rate must be positive"),
    ],
)
def test_gates_and_rates_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PerfusionConfig(**settings)


def test_a_truncated_covariance_is_refused(tiny, tmp_path):
    path = write_covariance(tmp_path / "c.safetensors", tiny.covariance())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="c.safetensors: truncated"):
        read_covariance(path)
