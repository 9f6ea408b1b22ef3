"""Custom Diffusion files: what goes in comes out, and what is none is refused."""

import pytest
import torch

from comfyui_personalize.models.custom_diffusion import (
    CustomDiffusion,
    read_custom_diffusion,
    write_authors_file,
    write_custom_diffusion,
)
from comfyui_personalize.models.errors import FormatError
from comfyui_personalize.models.learned_embeddings import LearnedEmbedding

NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def example(**rows):
    return CustomDiffusion({NAME: torch.rand(6, 4)}, (LearnedEmbedding("<dog>", rows),))


def test_several_rows_for_two_encoders_survive_our_file(tmp_path):
    changed = example(clip_l=torch.rand(2, 4), clip_g=torch.rand(2, 5))
    found = read_custom_diffusion(write_custom_diffusion(tmp_path / "a.safetensors", changed, {}))
    assert torch.equal(found.weights[NAME], changed.weights[NAME])
    (token,) = found.tokens
    assert token.trigger == "<dog>" and token.rows.keys() == {"clip_l", "clip_g"}
    assert all(torch.equal(token.rows[key], rows) for key, rows in changed.tokens[0].rows.items())


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_one_encoder_survive_the_authors_file(count, tmp_path):
    changed = example(clip_l=torch.rand(count, 4))
    (token,) = read_custom_diffusion(write_authors_file(tmp_path / "delta.bin", changed)).tokens
    assert torch.equal(token.rows["any"], changed.tokens[0].rows["clip_l"])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"other": torch.rand(2)}, "expected Custom Diffusion's entries unet and modifier_token"),
        ({"unet": {}}, "holds no keys and values"),
        ({"unet": {NAME: {"u": torch.rand(2), "v": torch.rand(2)}}}, "is no weight of keys or values"),
        ({"unet": {NAME.replace("attn2", "attn1"): torch.rand(6, 4)}}, "is no weight of keys or values"),
        ({"unet": {NAME: torch.full((6, 4), torch.nan)}}, "is no weight of keys or values"),
    ],
)
def test_other_files_are_refused(contents, message, tmp_path):
    torch.save(contents, tmp_path / "delta.bin")
    with pytest.raises(FormatError, match=message):
        read_custom_diffusion(tmp_path / "delta.bin")
