"""The LCM LoRA beside the weights, at the strengths that the authors fuse it with."""

import pytest
import torch

from comfyui_personalize.models.lora import parse_lora
from comfyui_personalize.trainers.adapters import with_prefix_removed
from comfyui_personalize.trainers.lookahead.identity_attention import PREVIEW, IdentityAttention


@pytest.mark.golden("lookahead", "15_*")
@torch.no_grad()
def test_strengths(case, tiny_unet, encoder, recorded_pass):
    own = {key.removeprefix("lcm_lora."): value for key, value in case.weights.items()}
    layers = tiny_unet.config.layers_per_block
    identity = IdentityAttention(
        tiny_unet, encoder, preview=with_prefix_removed(parse_lora(own, layers_per_block=layers), "unet")
    )
    given = recorded_pass()

    strengths = {"base": 0.0, "scale1": 1.0, "scale_s": case.config["lcm_lora_scale"]}
    for name, strength in strengths.items():
        got = identity.predict(given.sample, given.timesteps, given.conditioning, preview=strength)
        case.check(f"{name}.unet_out", got)

    changed = [name.removesuffix(".weight") for name in case.config["changed"]]
    deltas = {name: tiny_unet.get_submodule(name).get_delta_weight(PREVIEW) for name in changed}
    for name in ("scale1", "scale_s"):
        case.check(f"{name}.delta_norms", strengths[name] * torch.stack([deltas[layer].norm() for layer in changed]))
    start = "scale_s.delta."
    for name in [name for name in case.expected if name.startswith(start)]:
        case.check(name, strengths["scale_s"] * deltas[name.removeprefix(start).removesuffix(".weight")])
