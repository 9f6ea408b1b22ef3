"""Similarities of known vectors, and what the table says of them."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.similarity import Score, matched_similarity, mean_similarity, score_table


def test_the_mean_is_over_all_pairs_of_directions():
    made = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    real = torch.tensor([[0.5, 0.0], [0.0, 9.0], [-1.0, 0.0]])
    # To the x axis: 1, 0, -1. To the diagonal: 1/√2, 1/√2, -1/√2.
    torch.testing.assert_close(mean_similarity(made, real), torch.tensor([0.0, 2**-0.5 / 3]))


def test_the_same_picture_is_one_and_the_opposite_minus_one():
    vectors = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    assert mean_similarity(vectors, 7 * vectors).item() == pytest.approx(1, abs=1e-6)
    assert mean_similarity(vectors, -vectors).item() == pytest.approx(-1, abs=1e-6)


def test_half_precision_is_compared_in_single():
    vectors = torch.full((1, 4096), 8.0, dtype=torch.float16)  # the squares' sum overflows in float16
    found = mean_similarity(vectors, vectors), matched_similarity(vectors, vectors)
    assert [value.dtype for value in found] == [torch.float32] * 2
    assert [value.item() for value in found] == pytest.approx([1, 1])


def test_an_embedding_of_nothing_is_like_nothing():
    assert mean_similarity(torch.zeros(1, 3), torch.ones(2, 3)).item() == 0


def test_each_picture_meets_its_own_prompt_or_the_one_of_all():
    pictures = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    own = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(matched_similarity(pictures, own), torch.tensor([2**-0.5, 0.0]))
    torch.testing.assert_close(matched_similarity(pictures, own[1:]), torch.tensor([1.0, 0.0]))


def test_what_does_not_match_is_refused():
    with pytest.raises(ConfigError, match="found 2 prompts for 3 pictures; give one prompt for all"):
        matched_similarity(torch.ones(3, 4), torch.ones(2, 4))
    for compare in mean_similarity, matched_similarity:
        with pytest.raises(ConfigError, match="embeddings of 4 and of 5 numbers"):
            compare(torch.ones(1, 4), torch.ones(1, 5))


def test_means_leave_out_what_was_not_measured():
    assert Score("face", (0.5, None, 0.25)).mean == 0.375
    assert Score("face", (None, None)).mean is None
    assert Score("face").mean is None


def test_the_table_has_a_row_for_each_picture_and_the_means():
    scores = [Score("CLIP-I", (0.5, 0.75)), Score("face", (None, 0.25), "one left out"), Score("DINO", note="no DINO")]
    assert score_table(scores, 2).splitlines() == [
        "| image | CLIP-I | face | DINO |",
        "| ---: | ---: | ---: | ---: |",
        "| 1 | 0.5000 | – | – |",
        "| 2 | 0.7500 | 0.2500 | – |",
        "| mean | 0.6250 | 0.2500 | not measured |",
        "",
        "- face: one left out",
        "- DINO: no DINO",
    ]
    assert score_table(scores[:1], 2).splitlines()[-1] == "| mean | 0.6250 |"
