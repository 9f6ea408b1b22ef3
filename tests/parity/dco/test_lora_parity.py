"""The authors' LoRA file: read, written in every layout we offer, and loaded by diffusers' own loader."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from comfyui_personalize.models.formats import read_safetensors
from comfyui_personalize.models.keys import sgm_to_diffusers, to_sgm
from comfyui_personalize.models.lora import diffusers_tensors, kohya_tensors, parse_lora
from comfyui_personalize.trainers.adapters import add_lora, set_lora, with_prefix_removed
from comfyui_personalize.trainers.conditioning import Conditioning, predict


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


@pytest.mark.parametrize("layout", ["theirs", "diffusers", "kohya", "kohya with the original names"])
@pytest.mark.golden("dco", "lora_file", whole=False)
def test_diffusers_loads_every_layout(case, layout, tiny_unet, tmp_path):
    tensors, _ = read_safetensors(case.file(case.config["file"]))
    layers = tiny_unet.config.layers_per_block
    deltas = parse_lora(tensors, layers_per_block=layers)
    if layout == "diffusers":
        tensors = diffusers_tensors(deltas)
    elif layout == "kohya":
        tensors = kohya_tensors(deltas, "sd15")
    elif layout == "kohya with the original names":
        tensors = kohya_tensors(deltas, "sdxl", layers_per_block=layers)
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    state, alphas = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=tiny_unet.config)
    tiny_unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    check_prediction(case, tiny_unet)


@pytest.mark.golden("dco", "lora_file", whole=False)
def test_our_own_loader_agrees(case, tiny_unet):
    tensors, _ = read_safetensors(case.file(case.config["file"]))
    set_lora(tiny_unet, with_prefix_removed(parse_lora(tensors), "unet"))
    check_prediction(case, tiny_unet)


def check_prediction(case, unet):
    step = case.sibling("unet_lora_dco_step_frozen_text")
    given = Conditioning(*(step.inputs[name] for name in ("prompt_embeds", "pooled", "time_ids")))
    with torch.no_grad():
        step.check("model_pred", predict(unet, step.expected["noisy"], step.inputs["timesteps"], given))


@pytest.mark.golden("dco", "tiny_sdxl_unet_weights")
def test_weights_are_complete(case, tiny_unet, tiny_lora):
    case.check("n_params", torch.tensor(sum(parameter.numel() for parameter in tiny_unet.parameters())))
    assert {delta.rank for delta in tiny_lora.values()} == {case.config["rank"]}
    parameters = add_lora(tiny_unet, case.config["rank"], case.config["target_modules"], torch.Generator())
    assert {name.split(".lora_")[0] for name in parameters} == tiny_lora.keys()
