"""An encoder written as the authors' checkpoint: every name that their strict loading wants, and the same weights."""

from dataclasses import replace

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError
from comfyui_personalize.models.lookahead import Resampler
from comfyui_personalize.models.lookahead.authors_export import authors_ranks, authors_tensors, write_authors_file
from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder, encoder_tensors, read_encoder
from comfyui_personalize.models.lora import LowRankDelta

FROZEN = "encoder_unet."
VISION = "image_encoder."


@pytest.fixture
def frozen():
    """frozen(tensors) -> the base's UNet and the image encoder that such a checkpoint holds."""

    def parts(tensors):
        added = ("extract_kv", "lora_layer")
        unet = {key.removeprefix(FROZEN): value for key, value in tensors.items() if key.startswith(FROZEN)}
        unet = {key: value for key, value in unet.items() if not any(part in key for part in added)}
        return unet, {key.removeprefix(VISION): value for key, value in tensors.items() if key.startswith(VISION)}

    return parts


def test_the_full_size_file_has_the_recorded_keys_and_shapes(recorded_keys):
    recorded = {key: (tuple(shape), kind) for key, shape, kind in recorded_keys["keys"]}

    def of(*kinds):
        return {
            key.partition(".")[2]: torch.empty(shape, device="meta")
            for key, (shape, kind) in recorded.items()
            if kind in kinds
        }

    def delta(tensors, module):
        stem = f"{module}.lora_layer"
        return LowRankDelta(tensors[f"{stem}.down.weight"], tensors[f"{stem}.up.weight"])

    adapters, copied, lora = of("extract_kv2"), of("kvcopy_lora"), of("encoder_lora")
    blocks = dict.fromkeys(name.partition(".extract_kv2.")[0] for name in adapters)
    encoder = LookaheadEncoder(
        Resampler.from_tensors(of("image_proj_model")),
        {block: tuple(adapters[f"{block}.extract_kv2.to_{which}.weight"] for which in "kv") for block in blocks},
        {module: delta(lora, module) for module in dict.fromkeys(name.partition(".lora_layer.")[0] for name in lora)},
        {block: tuple(delta(copied, f"{block}.extract_kv1.to_{which}") for which in "kv") for block in blocks},
        "full size",
        {},
    )
    tensors = authors_tensors(encoder, of("sdxl_base"), of("image_encoder"))
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {key: row[0] for key, row in recorded.items()}
    assert authors_ranks(encoder) == (4, 4)


def test_what_was_read_is_written_again(authors, saved, frozen, tmp_path):
    tensors = authors()
    last = "up_blocks.1.attentions.0.transformer_blocks.0"  # the one that the fixture leaves without a LoRA
    encoder = read_encoder(saved(tensors))
    assert not any(module.startswith(last) for module in encoder.lora)
    path = write_authors_file(tmp_path / "again.pt", encoder, *frozen(tensors))
    again = torch.load(path, weights_only=True)
    doubled = {key for key in again if ".source_attention_block." in key}
    assert again.keys() - doubled == {key for key in tensors if ".source_attention_block." not in key}
    assert all(torch.equal(again[key], tensors[key]) for key in again.keys() - doubled)
    for key in doubled:
        block, _, rest = key.partition(".extract_kv")
        assert torch.equal(again[key], again[f"{block}.attn{rest[0]}.{rest.partition('block.')[2]}"])
    stored = {again[key].untyped_storage().data_ptr() for key in again}
    assert len(stored) < len(again) - len(doubled)  # copies are attn1's weights, and nothing is stored twice
    found, expected = encoder_tensors(read_encoder(path)), encoder_tensors(encoder)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ConfigError, match="exists already"):
        write_authors_file(path, encoder, *frozen(tensors))


def test_uneven_ranks_become_one(authors, saved, frozen, draw, tmp_path):
    tensors = authors(rank=2, copy_rank=0)
    encoder = read_encoder(saved(tensors))
    block, full = next((block, pair) for block, pair in encoder.copies.items() if block.startswith("mid_block"))
    module = f"{block}.attn1.to_q"
    wide = LowRankDelta(draw(5, 6), draw(6, 5), 0.5)
    changed = replace(
        encoder,
        lora={module: wide},
        copies=encoder.copies | {block: (LowRankDelta(draw(1, 6), draw(6, 1)), draw(6, 6))},
    )
    assert authors_ranks(changed) == (5, 1) and full == (None, None)
    path = write_authors_file(tmp_path / "uneven.pt", changed, *frozen(tensors))
    read = read_encoder(path)
    torch.testing.assert_close(read.lora[module].up, wide.up * 0.5)
    assert {delta.rank for delta in read.lora.values()} == {5}
    assert sum(bool(delta.up.any()) for delta in read.lora.values()) == 1
    keys, values = read.copies[block]
    x = draw(3, 6)
    weight = tensors[f"encoder_unet.{block}.attn1.to_k.weight"]
    torch.testing.assert_close(x @ keys.T, x @ weight.T + changed.copies[block][0].linear(x))
    torch.testing.assert_close(values, changed.copies[block][1])


def test_only_the_own_numbers_of_a_view_are_written(authors, saved, frozen, tmp_path):
    tensors = authors()
    unet, vision = frozen(tensors)
    plain = write_authors_file(tmp_path / "plain.pt", read_encoder(saved(tensors)), unet, vision)
    large = torch.zeros(2**20)
    large[:4] = unet["conv_in.bias"]
    path = write_authors_file(
        tmp_path / "view.pt", read_encoder(saved(tensors)), unet | {"conv_in.bias": large[:4]}, vision
    )
    assert path.stat().st_size < plain.stat().st_size + 4096


def test_another_unet_is_refused(authors, saved, frozen, tmp_path):
    tensors = authors()
    unet, vision = frozen(tensors)
    del unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    with pytest.raises(IncompatibleModelError, match="transformer blocks"):
        write_authors_file(tmp_path / "none.pt", read_encoder(saved(tensors)), unet, vision)
    assert not (tmp_path / "none.pt").exists()
