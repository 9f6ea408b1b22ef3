"""The authors' concept files: every entry, and the names of their layers at full size."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from comfyui_personalize.models.formats import read_torch_file
from comfyui_personalize.models.keys import sgm_to_diffusers, to_sgm
from comfyui_personalize.models.perfusion import VALUE, read_concept, write_concept
from comfyui_personalize.trainers.rank_one_edits import cross_projections


@pytest.mark.golden("perfusion", "checkpoint_layout")
def test_every_entry_of_the_file_arrives(case, tiny_unet):
    layers, path = tiny_unet.config.layers_per_block, case.file(case.config["file"])
    contents = read_torch_file(path)
    assert sorted(contents) == sorted(case.config["key_order"])
    assert type(contents["embedding"]["string_to_param"]).__name__ == case.config["string_to_param_type"]
    case.check("C_inv", contents["C_inv"])

    concept = read_concept(path, layers_per_block=layers)
    (placeholder,) = case.config["layout"]["embedding"]["string_to_token"]
    (rows,) = concept.embedding.rows.values()
    case.check(f"embedding.{placeholder}", rows)
    case.check("target_input", concept.parts.target_input)
    dual = case.expected["C_inv"].double() @ case.expected["target_input"].double()
    torch.testing.assert_close(concept.parts.dual.double(), dual, rtol=1e-6, atol=0)
    for module, output in concept.parts.outputs.items():
        case.check(f"target_output.{to_sgm(module, layers)}.target_output", output)
    assert concept.superclass == case.config["layout"]["embedding"]["initializer_words"][0]
    assert concept.parts.outputs.keys() == cross_projections(tiny_unet).keys()


@pytest.mark.golden("perfusion", "checkpoint_layout", whole=False)
def test_the_file_becomes_one_of_ours(case, tiny_unet, tmp_path):
    theirs = read_concept(case.file(case.config["file"]), "<bear>", layers_per_block=tiny_unet.config.layers_per_block)
    with_family = type(theirs)(**vars(theirs) | {"family": "sd15"})
    path = write_concept(tmp_path / "bear.safetensors", with_family, dtype=torch.float32)
    ours = read_concept(path)
    assert (ours.trigger, ours.superclass, ours.covariance) == ("<bear>", theirs.superclass, theirs.covariance)
    for module, output in theirs.parts.outputs.items():
        assert torch.equal(ours.parts.outputs[module], output)
    assert torch.equal(ours.parts.target_input, theirs.parts.target_input)
    assert torch.equal(ours.parts.dual, theirs.parts.dual)
    assert torch.equal(*(next(iter(concept.embedding.rows.values())) for concept in (ours, theirs)))


@pytest.mark.golden("perfusion", "target_output_keys")
def test_full_size_names(case):
    recorded = json.loads(case.file(case.config["file"]).read_text())
    for family, width in (("sd15", 768), ("sd21", 1024)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=width)
        modules = cross_projections(unet)
        weights = {f"{to_sgm(name)}.weight": list(module.weight.shape) for name, module in modules.items()}
        assert weights == recorded[f"{family}_kv_weights"]
        outputs = {name.replace(".weight", ".target_output"): shape[:1] for name, shape in weights.items()}
        assert {name: shape[1:] for name, shape in recorded[family].items()} == outputs
        assert {sgm_to_diffusers(name.removesuffix(".target_output")) for name in outputs} == modules.keys()
        trainable = {f"{to_sgm(name)}.target_output" for name in modules if name.endswith(VALUE)}
        assert trainable == set(recorded[f"{family}_trainable"])
        case.check(f"n_{family}", torch.tensor(len(outputs)))
        case.check("n_trainable", torch.tensor(len(trainable)))
