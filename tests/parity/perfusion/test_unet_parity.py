"""Edits in a whole UNet: the tiny model of the authors' class with recorded weights, through our diffusers binding."""

import pytest
import torch
from diffusers import Transformer2DModel

from comfyui_personalize.models.keys import to_sgm
from comfyui_personalize.models.perfusion import (
    VALUE,
    Covariance,
    EditSpace,
    Target,
    edit_space,
    moved_target_input,
    read_concept,
    resize_mask,
)
from comfyui_personalize.models.schedules import NoiseSchedule
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.perfusion.step import perfusion_step
from comfyui_personalize.trainers.rank_one_edits import RankOneEdits, cross_projections, project

OUTPUT = ".target_output"


def prediction(unet, case, context):
    return predict(unet, case.inputs["x"], case.inputs["timesteps"], Conditioning(context))


@pytest.mark.golden("perfusion", "tiny_ldm_unet_weights")
def test_weights_are_complete(case, tiny_unet):
    case.check("n", torch.tensor(sum(parameter.numel() for parameter in tiny_unet.parameters())))


@pytest.mark.golden("perfusion", "spatial_transformer")
def test_one_transformer(case, one_concept):
    inputs, config = case.inputs, case.config
    transformer = Transformer2DModel(
        num_attention_heads=config["heads"],
        attention_head_dim=config["dim_head"],
        in_channels=inputs["x"].shape[1],
        cross_attention_dim=inputs["context"].shape[-1],
        use_linear_projection=config["use_linear"],
    )
    outputs = {name.removesuffix(OUTPUT): [rows] for name, rows in case.weights.items() if name.endswith(OUTPUT)}
    plain = {name: tensor for name, tensor in case.weights.items() if not name.endswith(OUTPUT)}
    transformer.load_state_dict(plain, strict=True)
    RankOneEdits(transformer, one_concept(), outputs)
    with torch.no_grad():
        case.check("y", transformer(inputs["x"], encoder_hidden_states=inputs["context"], return_dict=False)[0])


@pytest.mark.golden("perfusion", "unet_apply_model")
def test_prediction(case, one_concept, tiny_unet, ldm_unet):
    outputs = ldm_unet.outputs(case.weights, tiny_unet.config.layers_per_block)
    edits = RankOneEdits(tiny_unet, one_concept(), {name: [rows] for name, rows in outputs.items()})
    with torch.no_grad():
        case.check("eps", prediction(tiny_unet, case, case.inputs["context"]))
        edits.superclass = case.inputs["context_super"]
        case.check("eps_super", prediction(tiny_unet, case, case.inputs["context"]))


@pytest.mark.golden("perfusion", "multi_concept_inference")
def test_several_concepts_from_the_authors_files(case, covariance, tiny_unet):
    config, layers = case.config, tiny_unet.config.layers_per_block
    concepts = [read_concept(case.file(name), layers_per_block=layers) for name in config["files"]]
    # The authors' files all say "*"; theirs are told apart by repeating it, ours by the files' names.
    assert len(set(config["placeholders"])) == len({concept.trigger for concept in concepts}) == config["n_concepts"]
    assert [concept.superclass for concept in concepts] == config["initializer_words"]
    assert {concept.covariance for concept in concepts} == {covariance.fingerprint}
    case.check("target_inputs", torch.stack([concept.parts.target_input for concept in concepts]))
    space = edit_space(concepts, config["beta"], config["tau"])
    case.check("projector", space.projection())

    modules = cross_projections(tiny_unet)
    shapes = {name: module.weight.shape for name, module in modules.items()}
    outputs = {}
    for name, module in modules.items():
        outputs[name] = [concept.target_output(name, lambda rows: project(module, rows)) for concept in concepts]  # noqa: B023
    for concept in concepts:
        concept.check_fit(shapes)
    edits = RankOneEdits(tiny_unet, space, outputs)
    with torch.no_grad():
        case.check("eps", prediction(tiny_unet, case, case.inputs["context"]))
        edits.superclass = case.inputs["context_super"]
        case.check("eps_super", prediction(tiny_unet, case, case.inputs["context"]))


@pytest.mark.golden("perfusion", "train_steps")
def test_training_steps(case, tiny_unet, ldm_unet):
    config, inputs = case.config, case.inputs
    covariance = Covariance(case.sibling("unet_apply_model").inputs["C_inv"].double())  # of the same tiny model
    rows = inputs["concept_token_idx"] + 1
    start = ldm_unet.outputs(case.sibling(config["init_case"]).expected, tiny_unet.config.layers_per_block)
    trained = {name: torch.nn.Parameter(value) for name, value in start.items() if name.endswith(VALUE)}
    embedding = torch.nn.Parameter(inputs["embedding"])
    optimizer = torch.optim.AdamW(
        [{"params": [embedding], "lr": config["embedding_lr"]}, {"params": list(trained.values())}],
        lr=config["target_output_lr"],
        weight_decay=config["weight_decay"],
    )
    target_input = inputs["target_input"]

    def space():
        target = Target(target_input, covariance.dual(target_input), config["beta"], config["tau"])
        return EditSpace([target])

    edits = RankOneEdits(tiny_unet, space(), {name: [trained.get(name, value)] for name, value in start.items()})
    schedule = NoiseSchedule.scaled_linear()
    steps = sum(name.startswith("loss_") for name in case.expected)
    for step in range(steps):
        given = {name: inputs[f"{name}_{step}"] for name in ("context", "latents", "mask", "noise", "timesteps")}
        context = given["context"].requires_grad_()
        target_input = moved_target_input(target_input, context, rows, config["ema_p"])
        case.check(f"target_input_{step}", target_input)
        edits.space = space()
        loss = perfusion_step(
            tiny_unet,
            schedule,
            latents=given["latents"],
            noise=given["noise"],
            timesteps=given["timesteps"],
            conditioning=Conditioning(context),
            masks=resize_mask(given["mask"], given["latents"].shape[-2:]),
        )
        optimizer.zero_grad()
        loss.backward()
        case.check(f"loss_{step}", loss)
        case.check(f"grad_context_{step}", context.grad)
        for name, parameter in trained.items():
            case.check(f"grad_{step}.{ldm_name(name, tiny_unet)}", parameter.grad)
        embedding.grad = inputs[f"grad_embedding_{step}"]
        optimizer.step()
        case.check(f"embedding_{step}", embedding)
    for name, parameter in trained.items():
        case.check(f"final.{ldm_name(name, tiny_unet)}", parameter)


def ldm_name(module, unet) -> str:
    return to_sgm(module, unet.config.layers_per_block) + OUTPUT
