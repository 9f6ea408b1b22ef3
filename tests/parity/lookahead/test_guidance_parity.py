"""The combination of the predictions that the authors' pipelines computed."""

import pytest

from comfyui_personalize.models.lookahead import few_step_weights, guidance_weights, lookahead_guidance, plain_weights


@pytest.mark.golden("lookahead", "05_guidance")
def test_combination(case):
    config = case.config
    predictions = {}
    for kind, name in {"shared": "full", "plain": "nokv"}.items():
        predictions[f"{kind}_uncond"], predictions[f"{kind}_text"] = case.inputs[name].chunk(2)

    scales = [config[f"guidance_scale_{name}"] for name in ("nokv", "full", "kv")]
    case.check("kv", lookahead_guidance(predictions, guidance_weights(*scales)))
    case.check("nokv", lookahead_guidance(predictions, plain_weights(config["guidance_scale"])))
    case.check("lcm_kv", lookahead_guidance(predictions, few_step_weights(sharing=True)))
    case.check("lcm_nokv", lookahead_guidance(predictions, few_step_weights(sharing=False)))
