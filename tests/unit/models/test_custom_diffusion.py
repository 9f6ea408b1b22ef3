"""Custom Diffusion files: what goes in comes out, and what is none is refused."""

import pytest
import torch

from comfyui_personalize.models.custom_diffusion import (
    CustomDiffusion,
    compressed,
    is_trained,
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


@pytest.mark.parametrize("authors", [False, True])
def test_compressed_weights_survive_both_files(authors, tmp_path):
    own, change = torch.rand(6, 4), torch.rand(6, 1) @ torch.rand(1, 4)
    bias = {NAME.replace("to_k.weight", "to_out.0.bias"): torch.rand(6)}
    changed = CustomDiffusion(bias, changes={NAME: compressed(change, 0.6)})
    assert changed.names == {NAME, *bias}
    if authors:
        found = read_custom_diffusion(write_authors_file(tmp_path / "delta.bin", changed))
    else:
        found = read_custom_diffusion(write_custom_diffusion(tmp_path / "a.safetensors", changed, {"a": "b"}))
        assert found.metadata["a"] == "b"
    assert found.changes[NAME].rank == 1 and found.names == changed.names
    torch.testing.assert_close(found.weight(NAME, own), own + change)


def test_compression_keeps_the_share_asked_for():
    left, right = (torch.linalg.qr(torch.rand(4, 4))[0] for _ in range(2))
    change = left @ torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0])) @ right
    # 5 and 3 of 10 reach 0.8; the first alone reaches half.
    assert [compressed(change, share).rank for share in (0.0, 0.49, 0.51, 0.79, 0.99)] == [1, 1, 2, 2, 4]
    whole = compressed(change, 1.0)
    torch.testing.assert_close(whole.up @ whole.down, change)
    assert compressed(torch.zeros(3, 4), 0.6).rank == 1


def test_what_the_two_parts_train():
    parameters = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    names = [
        f"mid_block.attentions.0.transformer_blocks.0.{layer}.{p}" for layer in ("attn1", "attn2") for p in parameters
    ]
    assert [name for name in names if is_trained(name, "cross_attention")] == names[5:]
    assert [name for name in names if is_trained(name)] == names[6:8]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"other": torch.rand(2)}, "expected Custom Diffusion's entries unet and modifier_token"),
        ({"unet": {}}, "holds no weights of cross-attention"),
        ({"unet": {NAME: {"u": torch.rand(2), "v": torch.rand(2)}}}, "is no weight of cross-attention"),
        ({"unet": {NAME: {"u": torch.rand(6, 2), "v": torch.rand(3, 4)}}}, "is no weight of cross-attention"),
        ({"unet": {NAME: {"u": torch.full((6, 2), torch.nan), "v": torch.rand(2, 4)}}}, "is no weight of cross"),
        ({"unet": {NAME.replace("attn2", "attn1"): torch.rand(6, 4)}}, "is no weight of cross-attention"),
        ({"unet": {NAME: torch.full((6, 4), torch.nan)}}, "is no weight of cross-attention"),
        ({"unet": {NAME: torch.rand(6)}}, "is no weight of cross-attention"),
        ({"unet": {NAME: torch.rand(6, 4)}, "modifier_token": {"<new1>": [0.5]}}, "a learned token are no tensor"),
        ({"unet": {NAME: torch.rand(6, 4)}, "modifier_token": {"<new1>": torch.tensor(0.5)}}, "a single number"),
        ({"unet": {NAME: torch.rand(6, 4)}, "modifier_token": {"<new1>": torch.full((4,), torch.nan)}}, "no numbers"),
    ],
)
def test_other_files_are_refused(contents, message, tmp_path):
    torch.save(contents, tmp_path / "delta.bin")
    with pytest.raises(FormatError, match=message):
        read_custom_diffusion(tmp_path / "delta.bin")
