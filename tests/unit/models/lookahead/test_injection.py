"""Properties of attention with a reference and of the adapter beside it."""

import math

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.lookahead import (
    add_adapter,
    append_or_repeat,
    attention,
    kept_tokens,
    region_tokens,
    shared_attention,
    sharing_weights,
)

HEADS = 2


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def own():
    return [draws(3, 6, 8, seed=seed) for seed in range(3)]


@pytest.fixture
def reference():
    return [draws(3, 4, 8, seed=seed) for seed in (3, 4)]


def appended(own, reference):
    q, k, v = own
    return attention(q, torch.cat([k, reference[0]], 1), torch.cat([v, reference[1]], 1), HEADS)


def test_attention_is_the_formula(own):
    q, k, v = own
    head = slice(4, 8)
    logits = q[1, :, head] @ k[1, :, head].T / math.sqrt(4)
    torch.testing.assert_close(attention(q, k, v, HEADS)[1, :, head], logits.softmax(-1) @ v[1, :, head])


def test_strength_zero_is_plain_attention_bit_for_bit(own, reference):
    assert torch.equal(shared_attention(*own, *reference, HEADS, strength=0), attention(*own, HEADS))


def test_strength_one_is_plain_appending_bit_for_bit(own, reference):
    assert torch.equal(shared_attention(*own, *reference, HEADS), appended(own, reference))
    weights = sharing_weights(rows=torch.ones(3))
    torch.testing.assert_close(shared_attention(*own, *reference, HEADS, weights=weights), appended(own, reference))


def test_half_the_strength_halves_what_the_reference_weighs():
    # One own and one reference token with equal logits: their shares are 1 / 1.5 and 0.5 / 1.5.
    zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    seen = shared_attention(zero, zero, zero, zero, 3 * one, 1, strength=0.5)
    torch.testing.assert_close(seen, one)


def test_strength_rises_from_one_end_to_the_other(own, reference):
    plain, full = attention(*own, HEADS), appended(own, reference)
    faint = shared_attention(*own, *reference, HEADS, strength=1e-6)
    torch.testing.assert_close(faint, plain, atol=1e-4, rtol=0)
    distances = [(shared_attention(*own, *reference, HEADS, strength=s) - plain).norm() for s in (0, 0.1, 0.3, 0.6, 1)]
    assert distances == sorted(distances) and distances[-1] == (full - plain).norm()


def test_rows_without_sharing_get_plain_attention(own, reference):
    weights = sharing_weights(rows=torch.tensor([1.0, 0.0, 0.5]))
    mixed = shared_attention(*own, *reference, HEADS, weights=weights)
    torch.testing.assert_close(mixed[1], attention(*own, HEADS)[1])
    torch.testing.assert_close(mixed[0], appended(own, reference)[0])
    half = shared_attention(*own, *reference, HEADS, strength=0.5)
    torch.testing.assert_close(mixed[2], half[2])


def test_the_order_of_rows_is_not_seen(own, reference):
    order = [2, 0, 1]
    rows = torch.tensor([1.0, 0.0, 0.5])
    mixed = shared_attention(*own, *reference, HEADS, weights=sharing_weights(rows=rows))
    again = [x[order] for x in (*own, *reference)]
    torch.testing.assert_close(shared_attention(*again, HEADS, weights=sharing_weights(rows=rows[order])), mixed[order])


def test_the_order_of_reference_tokens_is_not_seen(own, reference):
    order = [3, 1, 0, 2]
    torch.testing.assert_close(
        shared_attention(*own, *(x[:, order] for x in reference), HEADS), appended(own, reference)
    )


def test_dropped_tokens_are_as_if_cut_out(own, reference):
    kept = kept_tokens(torch.tensor([0.9, 0.2, 0.35, 0.5]), 0.35)
    assert kept.tolist() == [[True, False, False, True]], "a draw equal to the chance is dropped"
    masked = shared_attention(*own, *reference, HEADS, weights=sharing_weights(keys=kept))
    torch.testing.assert_close(masked, appended(own, [x[:, kept[0]] for x in reference]))


def test_dropping_everything_is_plain_attention(own, reference):
    kept = kept_tokens(torch.tensor([0.0, 0.3, 0.9, 1.0]), 1.0)
    assert not kept.any()
    masked = shared_attention(*own, *reference, HEADS, weights=sharing_weights(keys=kept))
    torch.testing.assert_close(masked, attention(*own, HEADS))


def test_outside_the_region_nothing_is_shared(own, reference):
    region = torch.tensor([[1.0, 0, 0, 1, 0, 1]])
    seen = shared_attention(*own, *reference, HEADS, weights=sharing_weights(queries=region))
    inside = region[0].bool()
    torch.testing.assert_close(seen[:, inside], appended(own, reference)[:, inside])
    torch.testing.assert_close(seen[:, ~inside], attention(*own, HEADS)[:, ~inside])


def test_masks_multiply():
    rows, queries, keys = torch.tensor([1.0, 0.5]), torch.rand(1, 3), torch.rand(2, 4)
    weights = sharing_weights(rows=rows, queries=queries, keys=keys)
    assert weights.shape == (2, 3, 4)
    torch.testing.assert_close(weights[1, 2, 3], 0.5 * queries[0, 2] * keys[1, 3])
    assert sharing_weights().tolist() == [[[1.0]]]


def test_repeating_own_tokens_changes_nothing_and_appending_shares(own):
    q, k, v = own
    shared_k, shared_v = draws(3, 6, 8, seed=5), draws(3, 6, 8, seed=6)
    keys, values = ([reference[:1], None, reference[2:]] for reference in (shared_k, shared_v))
    mixed = attention(q, append_or_repeat(k, keys), append_or_repeat(v, values), HEADS)
    torch.testing.assert_close(mixed[1], attention(*own, HEADS)[1])
    torch.testing.assert_close(mixed[[0, 2]], appended(own, [shared_k, shared_v])[[0, 2]])


def test_chunks_of_several_rows_share_one_reference_or_one_for_each(own):
    k = torch.cat([own[1], own[2]])
    one, each = draws(1, 4, 8, seed=5), draws(3, 4, 8, seed=6)
    joined = append_or_repeat(k, [one, each])
    assert torch.equal(joined[:, :6], k)
    assert torch.equal(joined[:3, 6:], one.expand(3, -1, -1)) and torch.equal(joined[3:, 6:], each)


def test_where_no_row_shares_nothing_is_made(own):
    assert append_or_repeat(own[1], [None] * 3) is own[1]


def test_a_reference_of_another_size_needs_rows_that_all_share_or_a_bias(own, reference):
    assert append_or_repeat(own[1], [reference[0]]).shape == (3, 10, 8)
    twice = torch.cat([own[1][:1]] * 2, dim=1)
    joined = append_or_repeat(own[1], [twice, None, None])
    assert torch.equal(joined[2], torch.cat([own[1][2]] * 3))
    hidden = append_or_repeat(own[1], [reference[0][:1], None, None], repeat=False)
    assert hidden.shape == (3, 10, 8) and not hidden[1:, 6:].any()
    with pytest.raises(ConfigError, match="found 6 and 4"):
        append_or_repeat(own[1], [reference[0][:1], None, None])


def test_references_of_different_sizes_are_refused(own, reference):
    with pytest.raises(ConfigError, match=r"3 rows cannot share 3 references with \[4, 6\] tokens"):
        append_or_repeat(own[1], [reference[0][:1], own[1][:1], None])
    with pytest.raises(ConfigError, match="3 rows cannot share 2"):
        append_or_repeat(own[1], [reference[0], None])


def test_one_reference_serves_all_rows(own, reference):
    one = [x[:1] for x in reference]
    torch.testing.assert_close(shared_attention(*own, *one, HEADS), appended(own, [x.expand(3, -1, -1) for x in one]))
    with pytest.raises(ConfigError, match="2 references for 3 rows"):
        shared_attention(*own, *(x[:2] for x in reference), HEADS)


@pytest.mark.parametrize("bad", [-0.5, math.inf, math.nan])
def test_weights_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match="finite numbers and not negative"):
        sharing_weights(rows=torch.tensor([1.0, bad]))


def test_adapter_scale_zero_is_the_same_tensor(own, reference):
    attended = draws(3, 6, 8, seed=7)
    assert add_adapter(attended, own[0], *reference, HEADS, scale=0) is attended
    assert torch.equal(add_adapter(attended, own[0], *reference, HEADS, scale=torch.zeros(3)), attended)


def test_the_adapter_adds_attention_over_its_tokens(own, reference):
    attended, scales = draws(3, 6, 8, seed=7), torch.tensor([0.0, 1.0, -0.5])
    seen = attention(own[0], *reference, HEADS)
    added = add_adapter(attended, own[0], *reference, HEADS, scale=scales)
    torch.testing.assert_close(added, attended + scales[:, None, None] * seen)
    one = add_adapter(attended, own[0], *(x[:1] for x in reference), HEADS, scale=0.7)
    torch.testing.assert_close(one[0], attended[0] + 0.7 * seen[0])


def test_the_adapter_acts_in_its_region_only(own, reference):
    attended, region = draws(3, 6, 8, seed=7), torch.tensor([[1.0, 0, 0.5, 1, 0, 1]])
    added = add_adapter(attended, own[0], *reference, HEADS, scale=1.0, region=region)
    assert torch.equal(added[:, 1], attended[:, 1])
    torch.testing.assert_close(added[:, 2], attended[:, 2] + 0.5 * attention(own[0], *reference, HEADS)[:, 2])


def test_a_picture_s_mask_becomes_one_value_per_token():
    mask = torch.zeros(1, 4, 8)
    mask[:, :2, :4] = 1
    mask[:, 2, 4] = 1
    assert region_tokens(mask, 2, 2).tolist() == [[1.0, 0.0, 0.0, 0.125]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(own, reference, dtype):
    weights = sharing_weights(rows=torch.tensor([1.0, 0.0, 0.3]))
    exact = shared_attention(*own, *reference, HEADS, weights=weights)
    half = shared_attention(*(x.to(dtype) for x in own), *reference, HEADS, weights=weights)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.03)


def test_gradients_are_finite_even_where_nothing_is_shared(own, reference):
    tensors = [x.requires_grad_() for x in (*own, *reference)]
    weights = sharing_weights(rows=torch.tensor([1.0, 0.0, 0.5]), keys=torch.tensor([[1.0, 0, 1, 1]]))
    shared_attention(*tensors, HEADS, weights=weights).square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in tensors)
    for x in tensors[3:]:
        assert x.grad[0].abs().max() > 0 and not x.grad[1].any() and not x.grad[:, 1].any()
