"""The tiny weights that several cases share."""

import pytest

from comfyui_personalize.models.lookahead import Resampler


@pytest.fixture
def shared(case):
    """The case that holds the weights."""
    return case.sibling(case.config["weights"].removesuffix(".safetensors"))


@pytest.fixture
def resampler(shared) -> Resampler:
    """The resampler of those weights, without gradients."""
    made = Resampler.from_tensors(shared.weights, prefix="image_proj_model.", head_dim=shared.config["head_dim"])
    return made.requires_grad_(False)
