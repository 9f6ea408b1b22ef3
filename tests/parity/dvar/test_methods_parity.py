"""Parts of the trainings that DVAR stops, against the authors' code: loss, embedding, attention and optimizer."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from comfyui_personalize.models.dvar.custom_diffusion import first_token_detached, masked_prior_loss
from comfyui_personalize.trainers.dvar.config import TextualInversionConfig
from comfyui_personalize.trainers.loop import train_loop
from comfyui_personalize.trainers.optimizer import ParameterGroup
from comfyui_personalize.trainers.text import LearnedTokenEmbedding


@pytest.mark.golden("dvar", "custom_masked_prior_loss")
def test_masked_loss_with_prior(case):
    prediction = case.inputs["noise_pred"].requires_grad_()
    loss, prior = masked_prior_loss(prediction, case.inputs["noise"], case.inputs["mask"], len(prediction) // 2)
    (gradient,) = torch.autograd.grad(loss, prediction)
    case.check("loss", loss)
    case.check("prior_loss", prior)
    case.check("grad_noise_pred", gradient)


@pytest.mark.golden("dvar", "split_embedding")
def test_learned_token_beside_a_frozen_table(case):
    weights = case.weights
    table = next(weights[name] for name in weights if "concept" not in name)
    embedding = LearnedTokenEmbedding(table, next(weights[name] for name in weights if "concept" in name))
    output = embedding(case.inputs["input_ids"])
    (output * case.inputs["upstream"]).sum().backward()
    case.check("output", output)
    case.check("grad_concept_token", embedding.learned.grad)
    assert embedding.weight.grad is None


@pytest.mark.golden("dvar", "custom_attn_processor")
def test_attention_whose_first_token_has_no_gradient(case):
    config = case.config
    attention = Attention(
        config["query_dim"],
        config["context_dim"],
        heads=config["heads"],
        dim_head=config["dim_head"],
    )
    attention.load_state_dict(case.weights)
    for projection in (attention.to_k, attention.to_v):
        projection.register_forward_hook(lambda module, given, output: first_token_detached(output))
    x, context = case.inputs["x"].requires_grad_(), case.inputs["context"].requires_grad_()
    output = attention(x, encoder_hidden_states=context)
    (output * case.inputs["upstream"]).sum().backward()
    case.check("output", output)
    case.check("grad_x", x.grad)
    case.check("grad_context", context.grad)
    for name, parameter in attention.named_parameters():
        case.check(f"grad.{name}", parameter.grad)


@pytest.mark.golden("dvar", "sam_step", "sam_step_adaptive")
def test_sharpness_aware_steps(case):
    config, inputs = case.config, case.inputs
    first, second = torch.nn.Parameter(inputs["w0"].clone()), torch.nn.Parameter(inputs["w1"].clone())
    seen = []

    def loss():
        straight = (inputs["A"] @ first.flatten() - inputs["b"]).square().sum()
        return straight + (second.sin() * inputs["c"]).sum() + 0.1 * first.sum() * second.square().sum()

    def after_step():
        step = len(seen)
        seen.append(step)
        case.check(f"w0_{step}", first)
        case.check(f"w1_{step}", second)

    settings = TextualInversionConfig(
        steps=config["steps"],
        batch_size=1,
        learning_rate=config["lr"],
        optimizer="adaptive_sam" if config["adaptive"] else "sam",
        sam_rho=config["rho"],
        sam_momentum=config["momentum"],
    )
    groups = [ParameterGroup("trained", {"w0": first, "w1": second}, config["lr"], weight_decay=0.5)]
    result = train_loop(settings, groups, loss, device=torch.device("cpu"), after_step=after_step)
    assert len(seen) == config["steps"]
    for step, found in enumerate(result.losses):
        case.check(f"loss_{step}", torch.tensor(found))
