"""The authors' LoRA file: read, written in every layout we offer, and loaded by diffusers' own loader."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_personalize.models.formats import read_safetensors
from comfyui_personalize.models.keys import sgm_to_diffusers, to_sgm
from comfyui_personalize.models.lora import diffusers_tensors, kohya_tensors, parse_lora


def assert_same_changes(got, expected):
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        change = got[name].up @ got[name].down * got[name].scale
        torch.testing.assert_close(change, delta.up @ delta.down * delta.scale, rtol=1e-6, atol=1e-7)


@pytest.mark.golden("dco", "lora_file")
def test_file_is_read_and_written_in_every_layout(case):
    tensors, metadata = read_safetensors(case.file(case.config["file"]))
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == case.config["keys"]
    assert metadata == case.config["metadata"]
    for key, tensor in tensors.items():
        case.check(f"file.{key}", tensor)

    layers = case.sibling("tiny_sdxl_unet_weights").config["unet_config"]["layers_per_block"]
    deltas = parse_lora(tensors, layers_per_block=layers)
    assert len(deltas) * 2 == len(tensors)
    assert {(delta.rank, delta.scale) for delta in deltas.values()} == {(case.config["rank"], 1.0)}
    assert_same_changes(parse_lora(diffusers_tensors(deltas)), deltas)
    for family in ("sd15", "sd21", "sdxl"):
        kohya = kohya_tensors(deltas, family, layers_per_block=layers)
        assert_same_changes(parse_lora(kohya, layers_per_block=layers), deltas)
    for name in deltas:
        module = name.removeprefix("unet.")
        assert to_sgm(module, layers).startswith(("input_blocks.", "middle_block.", "output_blocks."))
        assert sgm_to_diffusers(to_sgm(module, layers), layers) == module


@pytest.mark.parametrize("layout", ["theirs", "diffusers", "kohya"])
@pytest.mark.golden("dco", "lora_file", whole=False)
def test_diffusers_loads_every_layout(case, layout, tiny_unet, tmp_path):
    tensors, _ = read_safetensors(case.file(case.config["file"]))
    layers = tiny_unet.config.layers_per_block
    deltas = parse_lora(tensors, layers_per_block=layers)
    if layout == "diffusers":
        tensors = diffusers_tensors(deltas)
    elif layout == "kohya":
        # diffusers reads kohya files whose UNet keys carry its own names without knowing the architecture.
        tensors = kohya_tensors(deltas, "sd15")
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    from diffusers import StableDiffusionXLPipeline

    state, alphas = StableDiffusionXLPipeline.lora_state_dict(path)
    tiny_unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet")

    step = case.sibling("unet_lora_dco_step_frozen_text")
    inputs = step.inputs
    with torch.no_grad():
        prediction = tiny_unet(
            step.expected["noisy"],
            inputs["timesteps"],
            inputs["prompt_embeds"],
            added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
        ).sample
    step.check("model_pred", prediction)
