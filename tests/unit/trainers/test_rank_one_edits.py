"""Edits on a diffusers UNet: attached and taken off again, trained through, with and without checkpointing."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError
from comfyui_personalize.models.perfusion import KEY, VALUE, EditSpace, Target
from comfyui_personalize.trainers.adapters import add_lora
from comfyui_personalize.trainers.rank_one_edits import RankOneEdits, cross_projections, project

DIM, TOKENS = 6, 5


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=DIM,
        )
        .requires_grad_(False)
        .eval()
    )


@pytest.fixture
def space():
    vector = draws(DIM, seed=1)
    return EditSpace([Target(vector, vector, 0.7, 0.15)])


@pytest.fixture
def outputs(unet):
    return {name: [draws(1, 8, seed=place)] for place, name in enumerate(cross_projections(unet))}


def run(unet, context, x=None):
    x = draws(2, 4, 8, 8, seed=2) if x is None else x
    return unet(x, torch.tensor([10, 500]), context, return_dict=False)[0]


CONTEXT = draws(2, TOKENS, DIM, seed=3)


def test_the_model_is_as_before_when_the_edits_are_off_or_gone(unet, space, outputs):
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.no_grad():
        plain = run(unet, CONTEXT)
        edits = RankOneEdits(unet, space, outputs)
        assert not torch.equal(run(unet, CONTEXT), plain)
        edits.enabled = False
        edits.superclass = draws(2, TOKENS, DIM, seed=4)
        assert torch.equal(run(unet, CONTEXT), plain)
        edits.enabled = True
        edits.remove()
        edits.remove()
        assert torch.equal(run(unet, CONTEXT), plain)
    assert unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_every_projection_is_edited_in_place_of_the_next(unet, space, outputs):
    modules = cross_projections(unet)
    assert len(modules) == 8 and sum(name.endswith(KEY) for name in modules) == 4
    name, module = next(iter(modules.items()))
    RankOneEdits(unet, space, outputs)
    scores = space.measure(CONTEXT)
    plain, basis = project(module, CONTEXT), project(module, space.basis)
    expected = plain + scores.gates * outputs[name][0] - scores.components * basis
    torch.testing.assert_close(module(CONTEXT), expected, rtol=1e-5, atol=1e-5)


def test_a_new_space_takes_effect_at_once(unet, space, outputs):
    edits = RankOneEdits(unet, space, outputs)
    vector = draws(DIM, seed=9)
    other = EditSpace([Target(vector, vector, 0.5, 0.1)])
    with torch.no_grad():
        before = run(unet, CONTEXT)
        edits.space = other
        after = run(unet, CONTEXT)
        edits.remove()
        RankOneEdits(unet, other, outputs)
        assert torch.equal(run(unet, CONTEXT), after) and not torch.equal(before, after)


def test_global_locking_reaches_keys_alone(unet, space, outputs):
    superclass = draws(2, TOKENS, DIM, seed=4)
    edits = RankOneEdits(unet, space, outputs)
    modules = cross_projections(unet)
    answers = {name: module(CONTEXT) for name, module in modules.items()}
    edits.superclass = superclass
    for name, module in modules.items():
        locked = module(CONTEXT)
        assert torch.equal(locked, answers[name]) == name.endswith(VALUE)
        if name.endswith(KEY):
            edits.superclass = None
            assert torch.equal(locked, module(superclass))
            edits.superclass = superclass
    edits.superclass = superclass[:, :2]
    with pytest.raises(ConfigError, match="same length"):
        run(unet, CONTEXT)


def gradients(unet, space, outputs, checkpointing):
    values = {name: torch.nn.Parameter(rows[0].clone()) for name, rows in outputs.items() if name.endswith(VALUE)}
    edits = RankOneEdits(unet, space, {name: [values.get(name, rows[0])] for name, rows in outputs.items()})
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    context = CONTEXT.clone().requires_grad_()
    run(unet, context).square().mean().backward()
    edits.remove()
    unet.disable_gradient_checkpointing()
    return {name: value.grad for name, value in values.items()} | {"context": context.grad}


def test_checkpointing_gives_the_same_gradients(unet, space, outputs):
    plain = gradients(unet, space, outputs, checkpointing=False)
    recomputed = gradients(unet, space, outputs, checkpointing=True)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-9)
    assert not any(parameter.grad is not None for parameter in unet.parameters())


def test_a_lora_below_is_part_of_the_projection(unet, space, outputs):
    for name, parameter in add_lora(unet, 2, ["to_k", "to_v"], torch.Generator().manual_seed(0)).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    modules = cross_projections(unet)
    name, module = next((name, module) for name, module in modules.items() if name.endswith(VALUE))
    plain = module(CONTEXT)
    RankOneEdits(unet, space, {name: [rows] for name, (rows,) in zip(modules, outputs.values())})
    scores = space.measure(CONTEXT)
    expected = plain + scores.gates * list(outputs.values())[list(modules).index(name)][0]
    expected = expected - scores.components * project(module, space.basis)
    torch.testing.assert_close(module(CONTEXT), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_half(unet, space, outputs):
    unet.to(torch.bfloat16)
    RankOneEdits(unet, space, outputs)
    with torch.no_grad():
        answer = run(unet, CONTEXT.bfloat16(), draws(2, 4, 8, 8, seed=2).bfloat16())
    assert answer.dtype == torch.bfloat16 and answer.isfinite().all()


def test_other_models_are_refused(unet, space, outputs):
    name = next(iter(outputs))
    vector = torch.ones(DIM + 1)
    for wrong_space, wrong_outputs, message in (
        (space, {key: rows for key, rows in outputs.items() if key != name}, "edits 7 projections, this model has 8"),
        (space, outputs | {name: [torch.ones(1, 9)]}, "outputs of"),
        (EditSpace([Target(vector, vector)]), outputs, "width 7"),
    ):
        with pytest.raises(IncompatibleModelError, match=message):
            RankOneEdits(unet, wrong_space, wrong_outputs)
    assert not any(module._forward_hooks for module in unet.modules())
    with pytest.raises(IncompatibleModelError, match="no cross-attention"):
        cross_projections(torch.nn.Linear(2, 2))
