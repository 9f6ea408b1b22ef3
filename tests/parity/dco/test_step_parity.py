"""A whole training step through our trainer: predictions, loss and every gradient."""

import pytest
import torch

from comfyui_personalize.trainers.adapters import add_lora
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.dco.config import DCOConfig
from comfyui_personalize.trainers.dco.step import dco_step


@pytest.mark.golden("dco", "unet_lora_dco_step_*")
def test_step_through_the_unet(case, schedule, tiny_unet, tiny_lora):
    config, inputs = case.config, case.inputs
    assert config["lora_alpha"] == config["rank"]
    parameters = add_lora(tiny_unet, config["rank"], config["target_modules"], torch.Generator())
    with torch.no_grad():
        for name, parameter in parameters.items():
            module, side = name.split(".lora_")
            parameter.copy_(tiny_lora[module].down if side.startswith("A.") else tiny_lora[module].up)
    embeds, pooled = inputs["prompt_embeds"].requires_grad_(), inputs["pooled"].requires_grad_()
    sizes = inputs["time_ids"].expand(len(embeds), -1)
    policy = Conditioning(embeds, pooled, sizes)
    reference = Conditioning(
        inputs.get("base_prompt_embeds", embeds.detach()), inputs.get("base_pooled", pooled.detach()), sizes
    )
    passes = []
    tiny_unet.register_forward_hook(lambda module, given, out: passes.append((given[0], out[0])))

    loss = dco_step(
        tiny_unet,
        schedule,
        DCOConfig(beta=config["beta"], snr_gamma=config.get("snr_gamma") or 0.0),
        latents=inputs["latents"],
        noise=inputs["noise"],
        timesteps=inputs["timesteps"],
        policy=policy,
        reference=reference,
    )
    loss.backward()

    (_, of_reference), (noisy, of_policy) = passes
    case.check("noisy", noisy)
    case.check("refer_pred", of_reference)
    case.check("model_pred", of_policy)
    case.check("loss", loss)
    case.check("grad_prompt_embeds", embeds.grad)
    case.check("grad_pooled", pooled.grad)
    for name, parameter in parameters.items():
        module, side = name.split(".lora_")
        case.check(f"grad.{module}.lora.{'down' if side.startswith('A.') else 'up'}.weight", parameter.grad)
