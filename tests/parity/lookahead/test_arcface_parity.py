"""The face network: features, and the gradients that reach the picture."""

import json

import pytest
import torch

from comfyui_personalize.models.lookahead.arcface import build_arcface


@pytest.mark.golden("lookahead", "10_arcface_tiny")
def test_features_and_input_gradients(case):
    network = build_arcface(case.weights, "tiny")
    assert [len(network.body), network.size] == [sum(case.config["units"]), case.inputs["x"].shape[-1]]
    faces = case.inputs["x"].requires_grad_()
    features = network(faces)
    (gradient,) = torch.autograd.grad(features, faces, case.inputs["cotangent"])
    height, width = case.expected["input_grad_b0_crop"].shape[1:]

    case.check("features", features)
    case.check("input_grad_norm", gradient.flatten(1).norm(dim=1))
    case.check("input_grad_b0_crop", gradient[0, :, 40 : 40 + height, 40 : 40 + width])
    hidden = network.input_layer(faces)
    case.check("after_input_layer_mean", hidden.mean((2, 3)))
    case.check("after_body2_mean", network.body[:3](hidden).mean((2, 3)))


@pytest.mark.golden("lookahead", "10_arcface_tiny", whole=False)
def test_the_published_file_fits_key_by_key(case):
    entries = json.loads(case.file("arcface_ir_se50_keys.json").read_text())["keys"]
    tensors = {key: torch.zeros(shape, dtype=getattr(torch, kind)) for key, shape, kind in entries}
    network = build_arcface(tensors, "model_ir_se50.pth")
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == {
        key: shape for key, shape, _ in entries
    }
    assert network.size == 112 and sum(unit.stride == 2 for unit in network.body) == 4
