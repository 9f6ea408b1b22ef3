"""Properties of the rank-one edit."""

import math

import pytest
import torch
import torch.nn.functional as F

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.perfusion import (
    EditSpace,
    Target,
    at_positions,
    edit_projection,
    edited_input,
    gated_outputs,
    key_value_inputs,
)

DIM, OUT, TOKENS = 6, 4, 7


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive_definite(seed=10):
    root = draws(DIM, 2 * DIM, seed=seed)
    return root @ root.T / DIM


INVERSE = positive_definite()
WEIGHT = draws(OUT, DIM, seed=1)


def target(vector, beta=0.7, tau=0.15, gated_removal=False):
    return Target(vector, INVERSE @ vector, beta, tau, gated_removal)


def edited(space, x, *outputs, weight=WEIGHT):
    return edit_projection(F.linear(x, weight), space.measure(x), F.linear(space.basis.to(weight), weight), outputs)


def orthogonal_to(x, vector):
    """x without what it has of the vector in the inner product of C⁻¹."""
    return x - (x @ INVERSE @ vector).unsqueeze(-1) * vector / (vector @ INVERSE @ vector)


def test_one_concept_is_the_papers_formula():
    i, x, output = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3), draws(1, OUT, seed=4)
    sim, energy = (x @ INVERSE @ i).unsqueeze(-1), i @ INVERSE @ i
    expected = (x - i * sim / energy) @ WEIGHT.T + torch.sigmoid((sim / energy - 0.7) / 0.15) * output
    torch.testing.assert_close(edited(EditSpace([target(i)]), x, output), expected, rtol=1e-4, atol=1e-5)


def test_the_target_input_itself_is_answered_with_the_target_output():
    i, output = draws(DIM, seed=2), draws(1, OUT, seed=4)
    answer = edited(EditSpace([target(i, beta=0.5, tau=0.01)]), i.expand(1, TOKENS, DIM), output)
    torch.testing.assert_close(answer, output.expand(1, TOKENS, OUT), rtol=1e-4, atol=1e-4)


def test_an_encoding_that_has_nothing_of_the_concept_is_left_alone():
    i, x = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    x = orthogonal_to(x, i)
    # Its gate is σ(-0.75/0.02) = 5e-17.
    answer = edited(EditSpace([target(i, beta=0.75, tau=0.02)]), x, draws(1, OUT, seed=4))
    torch.testing.assert_close(answer, F.linear(x, WEIGHT), rtol=1e-5, atol=1e-5)


def test_an_infinite_bias_closes_the_gate():
    i, x = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    answer = edited(EditSpace([target(i, beta=math.inf)]), x, torch.full((1, OUT), 1e6))
    torch.testing.assert_close(answer, F.linear(orthogonal_to(x, i), WEIGHT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [10.0, math.inf])
def test_a_closed_gate_takes_the_concepts_component_away_and_nothing_else(beta):
    """No bias switches a concept off, in the authors' code (perfusion/roe.py) as here: W i* sim/E stays away."""
    i, x = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    lost = F.linear(x, WEIGHT) - edited(EditSpace([target(i, beta)]), x, draws(1, OUT, seed=4))
    share = (x @ INVERSE @ i) / (i @ INVERSE @ i)
    torch.testing.assert_close(lost, share.unsqueeze(-1) * F.linear(i, WEIGHT), rtol=1e-4, atol=1e-5)
    assert lost.abs().max() > 0.1


@pytest.mark.parametrize("beta", [10.0, math.inf])
def test_a_closed_gate_is_the_plain_model_for_encodings_without_the_concept(beta):
    i, x = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    x = orthogonal_to(x, i)
    answer = edited(EditSpace([target(i, beta)]), x, torch.full((1, OUT), 100.0))
    torch.testing.assert_close(answer, F.linear(x, WEIGHT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [10.0, math.inf])
@pytest.mark.parametrize("others", [0, 2])
def test_a_closed_gate_with_gated_removal_is_the_plain_model_for_every_encoding(beta, others):
    vectors, x = draws(1 + others, DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    space = EditSpace([target(vector, beta, gated_removal=True) for vector in vectors])
    answer = edited(space, x, *torch.full((1 + others, 1, OUT), 100.0))
    torch.testing.assert_close(answer, F.linear(x, WEIGHT), rtol=1e-5, atol=1e-5)


def test_gated_removal_takes_what_the_gate_lets_through():
    i, x, output = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3), draws(1, OUT, seed=4)
    share = ((x @ INVERSE @ i) / (i @ INVERSE @ i)).unsqueeze(-1)
    gate = torch.sigmoid((share - 0.7) / 0.15)
    expected = F.linear(x, WEIGHT) + gate * (output - share * F.linear(i, WEIGHT))
    torch.testing.assert_close(edited(EditSpace([target(i, gated_removal=True)]), x, output), expected)


def test_a_concept_with_a_closed_gate_and_gated_removal_is_not_there_for_the_others():
    vectors, x, outputs = draws(2, DIM, seed=2), draws(2, TOKENS, DIM, seed=3), draws(2, 1, OUT, seed=4)
    for own in (False, True):
        first, second = target(vectors[0], gated_removal=own), target(vectors[1], math.inf, gated_removal=True)
        together = edited(EditSpace([first, second]), x, *outputs)
        torch.testing.assert_close(together, edited(EditSpace([first]), x, outputs[0]), rtol=1e-4, atol=1e-4)


def test_open_gates_take_away_the_same_with_gated_removal():
    vectors, x, outputs = draws(3, DIM, seed=2), draws(2, TOKENS, DIM, seed=3), draws(3, 1, OUT, seed=4)
    vectors = torch.cat([vectors, vectors[:1]])  # a span of fewer dimensions than concepts
    outputs = torch.cat([outputs, outputs[:1]])
    plain, gated = (EditSpace([target(v, -math.inf, gated_removal=own) for v in vectors]) for own in (False, True))
    torch.testing.assert_close(edited(gated, x, *outputs), edited(plain, x, *outputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [1.0, 0.3, 1e-3])
def test_gated_removal_never_takes_more_than_removal_everywhere(apart):
    first, x = draws(DIM, seed=2), draws(50, TOKENS, DIM, seed=3)
    pair = [(first, 0.55), (first + apart * draws(DIM, seed=5), 0.8)]
    lost = []
    for own in (False, True):
        space = EditSpace([target(vector, beta, gated_removal=own) for vector, beta in pair])
        lost.append(space.measure(x).components.norm(dim=-1))  # the basis is orthonormal
    assert (lost[1] <= lost[0] * 1.001).all() and lost[1].mean() < 0.9 * lost[0].mean()


def test_gated_removal_of_two_concepts_is_the_formula():
    vectors, x, betas = draws(2, DIM, seed=2), draws(1, 1, DIM, seed=3), (0.1, 0.3)
    space = EditSpace([target(vector, beta, 0.5, gated_removal=True) for vector, beta in zip(vectors, betas)])
    scores = space.measure(x)
    unit = vectors / (vectors @ INVERSE * vectors).sum(dim=1, keepdim=True).sqrt()
    root = scores.gates[0, 0].sqrt().diag()
    inner = root @ (unit @ INVERSE @ unit.T) @ root + torch.eye(2) - root @ root
    removed = unit.T @ root @ inner.inverse() @ root @ unit @ INVERSE @ x[0, 0]
    torch.testing.assert_close(scores.components[0, 0] @ space.basis, removed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_encodings_may_lie_on_another_device_than_the_concepts(gated):
    """In the host concepts stay on the CPU and encodings come on the GPU, of which this is a model without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    space = EditSpace([target(vector, gated_removal=gated) for vector in draws(2, DIM, seed=2)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        scores = space.measure(torch.empty(2, TOKENS, DIM, device="cuda"))
    assert scores.gates.device.type == scores.components.device.type == "cuda"


def test_strength_zero_is_the_plain_projection_bit_for_bit():
    space, x = EditSpace([target(draws(DIM, seed=2))]), draws(2, TOKENS, DIM, seed=3)
    plain, output, basis = F.linear(x, WEIGHT), draws(1, OUT, seed=4), F.linear(space.basis, WEIGHT)
    assert torch.equal(edit_projection(plain, space.measure(x).scaled(0), basis, [output]), plain)
    half_off = edit_projection(plain, space.measure(x).scaled(torch.tensor([1.0, 0.0])), basis, [output])
    assert torch.equal(half_off[1], plain[1])
    assert torch.equal(half_off[0], edited(space, x, output)[0])


def test_the_order_of_concepts_does_not_matter():
    vectors, x = draws(3, DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    outputs = draws(3, 1, OUT, seed=4)
    targets = [target(vector, beta, tau) for vector, beta, tau in zip(vectors, (0.5, 0.7, 0.9), (0.1, 0.2, 0.15))]
    forth = edited(EditSpace(targets), x, *outputs)
    back = edited(EditSpace(targets[::-1]), x, *outputs.flip(0))
    torch.testing.assert_close(forth, back, rtol=1e-4, atol=1e-4)


def test_two_orthogonal_concepts_are_the_sum_of_their_single_edits():
    first, second, x = draws(DIM, seed=2), draws(DIM, seed=5), draws(2, TOKENS, DIM, seed=3)
    second = orthogonal_to(second, first)
    outputs, plain = draws(2, 1, OUT, seed=4), F.linear(x, WEIGHT)
    together = edited(EditSpace([target(first), target(second)]), x, *outputs) - plain
    apart = [edited(EditSpace([target(i)]), x, output) - plain for i, output in zip((first, second), outputs)]
    torch.testing.assert_close(together, sum(apart), rtol=1e-4, atol=1e-4)


def test_concepts_that_are_alike_are_not():
    first, x = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    targets = [target(first), target(first + 0.3 * draws(DIM, seed=5))]
    outputs, plain = draws(2, 1, OUT, seed=4), F.linear(x, WEIGHT)
    together = edited(EditSpace(targets), x, *outputs) - plain
    apart = sum(edited(EditSpace([one]), x, output) - plain for one, output in zip(targets, outputs))
    assert (together - apart).abs().max() > 0.1 * together.abs().max()


def test_the_projection_is_one_and_its_basis_orthonormal():
    vectors = draws(3, DIM, seed=2)
    space = EditSpace([target(vector) for vector in vectors])
    projection = space.projection()
    torch.testing.assert_close(projection @ projection, projection, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projection @ vectors.T, vectors.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(space.basis @ INVERSE @ space.basis.T, torch.eye(3), rtol=1e-4, atol=1e-4)


def test_the_same_concept_twice_takes_away_only_once():
    i, x = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3)
    twice = EditSpace([target(i), target(i)])
    assert twice.basis.shape == (1, DIM)
    torch.testing.assert_close(twice.projection(), EditSpace([target(i)]).projection(), rtol=1e-4, atol=1e-5)
    outputs = [draws(1, OUT, seed=4), torch.zeros(1, OUT)]
    torch.testing.assert_close(edited(twice, x, *outputs), edited(EditSpace([target(i)]), x, outputs[0]))


def test_a_multiple_of_the_covariance_is_the_same_covariance():
    i, x, output = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3), draws(1, OUT, seed=4)
    scaled = EditSpace([Target(i, 77 * INVERSE @ i, 0.7, 0.15)])
    torch.testing.assert_close(edited(scaled, x, output), edited(EditSpace([target(i)]), x, output))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_its_own_rounding_and_no_more(dtype):
    i, x, output = draws(DIM, seed=2), draws(2, TOKENS, DIM, seed=3).to(dtype), draws(1, OUT, seed=4)
    space, weight = EditSpace([target(i)]), WEIGHT.to(dtype)
    scores = space.measure(x)
    assert scores.gates.dtype == scores.components.dtype == torch.float32
    assert torch.equal(scores.gates, space.measure(x.float()).gates)
    answer = edited(space, x, output, weight=weight)
    assert answer.dtype == dtype
    expected = edited(space, x.float(), output, weight=weight.float())
    torch.testing.assert_close(answer.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max())


def test_half_precision_does_not_overflow_in_the_gate():
    # 300² times six exceeds what float16 holds.
    i = torch.full((DIM,), 300.0)
    space = EditSpace([Target(i, i, 0.7, 0.15)])
    scores = space.measure(i.half().expand(1, 1, DIM))
    assert scores.gates.item() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-5)


def test_autocast_does_not_round_the_gate():
    space, x = EditSpace([target(draws(DIM, seed=2))]), draws(2, TOKENS, DIM, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = space.measure(x)
    assert torch.equal(inside.gates, space.measure(x).gates)
    assert torch.equal(inside.components, space.measure(x).components)


def test_gradients_are_those_of_the_formula():
    i, output = draws(DIM, seed=2), draws(TOKENS, OUT, seed=4).double().requires_grad_()
    space, x = EditSpace([target(i)]), draws(2, TOKENS, DIM, seed=3).requires_grad_()
    edited(space, x, output).square().sum().backward()
    direction = draws(2, TOKENS, DIM, seed=9)
    with torch.no_grad():
        up, down = (edited(space, x + step * direction, output).square().sum() for step in (1e-2, -1e-2))
    assert (x.grad * direction).sum().item() == pytest.approx(((up - down) / 2e-2).item(), rel=1e-2)
    assert output.grad.abs().max() > 0


def test_an_edited_input_with_the_outputs_behind_it_is_the_same_edit():
    space, x = EditSpace([target(vector) for vector in draws(2, DIM, seed=2)]), draws(2, TOKENS, DIM, seed=3)
    outputs, scores = draws(2, TOKENS, OUT, seed=4), space.measure(x)
    behind = F.linear(edited_input(x, scores, space), WEIGHT) + gated_outputs(scores, outputs)
    torch.testing.assert_close(behind, edited(space, x, *outputs), rtol=1e-4, atol=1e-5)


def test_rows_of_target_outputs_begin_anew_in_longer_prompts():
    rows = torch.arange(3.0).unsqueeze(1)
    assert at_positions(rows, 7).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert at_positions(rows, 3) is rows and at_positions(rows[:1], 7).shape == (1, 1)
    assert at_positions(rows, 2).flatten().tolist() == [0, 1]


def test_global_locking_changes_what_keys_read():
    x, superclass = draws(2, TOKENS, DIM), draws(2, TOKENS, DIM, seed=1)
    assert key_value_inputs(x, superclass) == (superclass, x)
    assert key_value_inputs(x) == (x, x)
    with pytest.raises(ConfigError, match="same length"):
        key_value_inputs(x, superclass[:, :3])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "at least one concept"),
        ([target(torch.full((DIM,), math.nan))], "expected positive numbers"),
        ([target(torch.zeros(DIM))], "expected positive numbers"),
        ([Target(torch.ones(DIM), -torch.ones(DIM))], "expected positive numbers"),
        ([target(torch.ones(DIM), tau=0.0)], "tau 0.0"),
        ([target(torch.ones(DIM), tau=math.nan)], "tau nan"),
        ([target(torch.ones(DIM), beta=math.nan)], "beta nan"),
        ([target(torch.ones(DIM)), Target(torch.ones(3), torch.ones(3))], "one model family"),
    ],
)
def test_bad_targets_are_refused(targets, message):
    with pytest.raises(ConfigError, match=message):
        EditSpace(targets)


def test_encodings_of_another_width_are_refused():
    with pytest.raises(ConfigError, match="width 6, these have 8"):
        EditSpace([target(draws(DIM))]).measure(torch.zeros(1, 2, 8))
