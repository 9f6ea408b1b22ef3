"""Concepts as a training leaves them."""

import pytest
import torch

from comfyui_personalize.models.learned_embeddings import LearnedEmbedding
from comfyui_personalize.models.perfusion import KEY, VALUE, Concept, ConceptParts

BLOCKS = ("down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0")


def random_concept(dim=8, shapes=None, mode="paper", keys=False, trigger="<bear>", seed=0, widths=None):
    """shapes: module -> (out, dim); by default two small blocks."""
    generator = torch.Generator().manual_seed(seed)

    def draws(*shape):
        return torch.randn(shape, generator=generator).half().float()  # what the file can hold

    if shapes is None:
        shapes = {block + end: (4, dim) for block in BLOCKS for end in (KEY, VALUE)}
    rows = {"paper": 1, "positions": 77}[mode]
    outputs = {name: draws(rows, shape[0]) for name, shape in shapes.items() if keys or name.endswith(VALUE)}
    vector = draws(dim)
    return Concept(
        embedding=LearnedEmbedding(trigger, {key: draws(1, w) for key, w in (widths or {"clip_l": dim}).items()}),
        superclass="teddy",
        parts=ConceptParts(vector, vector * 1.5, outputs, None if keys else draws(rows, dim)),
        covariance="0123456789abcdef",
        family="sd15",
        name="bear.safetensors",
        metadata={},
    )


@pytest.fixture
def make_concept():
    """make_concept(**settings) -> a random concept."""
    return random_concept
