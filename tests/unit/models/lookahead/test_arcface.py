"""What is refused as a face network."""

import pytest
import torch

from comfyui_personalize.models.errors import FormatError
from comfyui_personalize.models.lookahead.arcface import ArcFace, build_arcface

UNITS = [(8, 8, 1, 2, False), (8, 12, 1, 2, True), (12, 12, 1, 1, False)]


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return ArcFace(UNITS, 10, 2).state_dict()


def test_it_is_rebuilt_from_its_file_and_frozen(tensors):
    network = build_arcface(tensors, "face.pth")
    assert network.size == 8 and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    faces = torch.randn(2, 3, 8, 8, requires_grad=True)
    features = network(faces)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert torch.autograd.grad(features[0, 0], faces)[0][0].any()


def spoiled(tensors):
    yield {}
    yield {"weight": torch.zeros(3)}
    yield {key: value for key, value in tensors.items() if key != "body.1.res_layer.0.running_var"}
    yield {key: value for key, value in tensors.items() if not key.startswith("body.1.")}
    yield {**tensors, "more": torch.zeros(1)}
    yield {**tensors, "output_layer.3.weight": torch.zeros(10, 50)}
    yield {**tensors, "body.0.res_layer.1.weight": torch.zeros(8)}


def test_other_files_are_refused(tensors):
    for wrong in spoiled(tensors):
        with pytest.raises(FormatError, match="face.pth is no IR-SE50 face network; choose"):
            build_arcface(wrong, "face.pth")
