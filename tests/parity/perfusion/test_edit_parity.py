"""The rank-one edit against the authors' layers: values, gradients, global locking, several concepts."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_personalize.models.perfusion import EditSpace, Target, edit_projection, key_value_inputs


def edited(space, weight, x, *outputs):
    return edit_projection(F.linear(x, weight), space.measure(x), F.linear(space.basis, weight), outputs)


@pytest.mark.golden("perfusion", "roe_linear_*")
def test_one_projection(case, one_concept):
    weight, upstream = case.weights["weight"], case.inputs["upstream"]
    output = case.weights["target_output"].requires_grad_(not case.config["lock"])
    for i, gate in enumerate(zip(case.config["betas"], case.config["taus"], strict=True)):
        x, output.grad = case.inputs["x"].clone().requires_grad_(), None
        space = one_concept(*gate)
        h = edited(space, weight, x, output)
        (h * upstream).sum().backward()
        case.check(f"h_{i}", h)
        case.check(f"grad_x_{i}", x.grad)
        if not case.config["lock"]:
            case.check(f"grad_target_output_{i}", output.grad)
        key_input, value_input = key_value_inputs(case.inputs["x"], case.inputs["x_super"])
        assert value_input is case.inputs["x"]
        case.check(f"h_super_{i}", edited(space, weight, key_input, output))


@pytest.mark.golden("perfusion", "mc_roe_*")
def test_several_concepts(case, covariance):
    weight, inputs = case.weights["weight"], case.inputs
    count, outputs = case.config["n_concepts"], case.weights["target_outputs"]

    def space(betas, taus):
        gates = zip(inputs["target_inputs"], betas, taus, strict=True)
        return EditSpace([Target(vector, covariance.dual(vector), beta, tau) for vector, beta, tau in gates])

    own = space(case.config["beta_list"], case.config["tau_list"])
    case.check("h_list", edited(own, weight, inputs["x"], *outputs))
    case.check("h_super", edited(own, weight, inputs["x_super"], *outputs))
    case.check("projector", own.projection())
    alike = space([case.config["beta"]] * count, [case.config["tau"]] * count)
    case.check("h_float", edited(alike, weight, inputs["x"], *outputs))


@pytest.mark.golden("perfusion", "cross_attention")
def test_cross_attention(case, one_concept):
    inputs, weights, heads = case.inputs, case.weights, case.config["heads"]
    space = one_concept()
    x, context = (inputs[name].requires_grad_() for name in ("x", "context"))
    value_output = weights["to_v.target_output"].requires_grad_()

    def attend(superclass=None):
        key_input, value_input = key_value_inputs(context, superclass)
        q = F.linear(x, weights["to_q.weight"])
        k = edited(space, weights["to_k.weight"], key_input, weights["to_k.target_output"])
        v = edited(space, weights["to_v.weight"], value_input, value_output)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(attended, weights["to_out.0.weight"], weights["to_out.0.bias"])

    assert q_width(weights) == heads * case.config["dim_head"]
    y = attend()
    (y * inputs["upstream"]).sum().backward()
    case.check("y", y)
    case.check("grad_x", x.grad)
    case.check("grad_context", context.grad)
    case.check("grad_v_target_output", value_output.grad)
    case.check("y_super", attend(inputs["context_super"]))


def q_width(weights) -> int:
    return len(weights["to_q.weight"])


@pytest.mark.golden("perfusion", "roe_linear_*", whole=False)
def test_the_recorded_cases_tell_formulas_apart(case, one_concept):
    """What the tolerance would let pass: the gate without its temperature, or the encoding left in place."""
    x, weight, output = case.inputs["x"], case.weights["weight"], case.weights["target_output"]
    space = one_concept(case.config["betas"][0], 1.0)
    with pytest.raises(AssertionError, match="is off by"):
        case.check("h_0", edited(space, weight, x, output))
    scores = one_concept(case.config["betas"][0], case.config["taus"][0]).measure(x)
    with pytest.raises(AssertionError, match="is off by"):
        case.check("h_0", F.linear(x, weight) + scores.gates * output)
    assert not torch.equal(case.inputs["x"], case.inputs["x_super"])
