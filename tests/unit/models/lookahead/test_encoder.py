"""Reading and writing encoders: what is taken from each kind of file, and which files are refused."""

import json
import struct
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.formats import read_header
from comfyui_personalize.models.lookahead import authors_file
from comfyui_personalize.models.lookahead.encoder import FORMAT, encoder_tensors, read_encoder, write_encoder
from comfyui_personalize.models.lookahead.ip_adapter_file import SDXL_BLOCKS
from comfyui_personalize.models.lora import LowRankDelta
from comfyui_personalize.models.mapped import map_weights

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAST = "up_blocks.1.attentions.0.transformer_blocks.0"
FOUR_BLOCKS = tuple(f"down_blocks.1.attentions.0.transformer_blocks.{number}" for number in range(4))
IN_FILE = f"encoder_unet.{BLOCK}"


def test_the_authors_checkpoint_gives_what_was_trained(authors, saved):
    tensors = authors()
    encoder = read_encoder(saved(tensors))
    assert encoder.trained and encoder.name == "model_ckpt.pt" and len(encoder.adapter) == 4
    assert torch.equal(encoder.adapter[BLOCK][1], tensors[f"{IN_FILE}.extract_kv2.to_v.weight"])
    assert torch.equal(encoder.resampler.latents, tensors["image_proj_model.latents"])
    assert not any(parameter.requires_grad for parameter in encoder.resampler.parameters())
    assert len(encoder.lora) == 3 * 8 and not any(module.startswith(LAST) for module in encoder.lora)
    change = encoder.lora[f"{BLOCK}.attn2.to_out.0"]
    assert torch.equal(change.up, tensors[f"{IN_FILE}.attn2.to_out.0.lora_layer.up.weight"]) and change.scale == 1


@pytest.mark.parametrize("equal", [True, False], ids=["copied from attn1", "started elsewhere"])
def test_copies_make_the_keys_that_the_authors_module_makes(authors, saved, draw, equal):
    tensors = authors()
    if not equal:
        tensors[f"{IN_FILE}.extract_kv1.to_k.weight"] += 0.1
    copy, value_copy = read_encoder(saved(tensors)).copies[BLOCK]
    part = {leaf: tensors[f"{IN_FILE}.extract_kv1.to_k.{leaf}"] for leaf in
            ("weight", "lora_layer.down.weight", "lora_layer.up.weight")}  # fmt: skip
    x = draw(2, 9, 6)
    theirs = F.linear(x, part["weight"]) + F.linear(
        F.linear(x, part["lora_layer.down.weight"]), part["lora_layer.up.weight"]
    )
    own = F.linear(x, tensors[f"{IN_FILE}.attn1.to_k.weight"])
    ours = own + copy.linear(x) if equal else F.linear(x, copy)
    assert isinstance(copy, LowRankDelta) == isinstance(value_copy, LowRankDelta) == equal
    torch.testing.assert_close(ours, theirs)


def test_copies_in_another_precision_are_still_attention_s_own(authors, saved):
    tensors = authors()
    for which in ("to_k", "to_v"):
        name = f"{IN_FILE}.extract_kv1.{which}.weight"
        tensors[name] = tensors[name].half()
    assert isinstance(read_encoder(saved(tensors)).copies[BLOCK][0], LowRankDelta)
    tensors[name] = tensors[name] * 1.002  # two steps of float16
    assert isinstance(read_encoder(saved(tensors)).copies[BLOCK][0], torch.Tensor)


def test_a_training_without_loras_changed_the_copies_themselves(authors, saved):
    tensors = authors(rank=0, copy_rank=0)
    assert not read_encoder(saved(tensors)).trained
    tensors[f"{IN_FILE}.extract_kv1.to_v.weight"] += 1
    encoder = read_encoder(saved(tensors))
    assert encoder.trained and encoder.lora == {} and encoder.copies[LAST] == (None, None)
    assert torch.equal(encoder.copies[BLOCK][1], tensors[f"{IN_FILE}.extract_kv1.to_v.weight"])


@pytest.mark.parametrize("ranks", [(1, 1), (4, 0), (0, 5)])
def test_any_ranks(authors, saved, tmp_path, ranks):
    encoder = read_encoder(saved(authors(*ranks)))
    assert {delta.rank for delta in encoder.lora.values()} == {ranks[0]} - {0}
    again = read_encoder(write_encoder(tmp_path / "slim.safetensors", encoder, {}, dtype=torch.float32))
    same_tensors(encoder_tensors(again, torch.float32), encoder_tensors(encoder, torch.float32))
    assert again.trained and again.copies.keys() == encoder.copies.keys()


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_slim_file_is_half_precision_and_explains_itself(authors, saved, tmp_path):
    encoder = read_encoder(saved(authors()))
    path = write_encoder(tmp_path / "slim.safetensors", encoder, {"modelspec.title": "face"})
    header = read_header(path)
    assert header.format == FORMAT == "lookahead-encoder/1" and set(header.dtypes.values()) == {"F16"}
    assert {key.split(".")[0] for key in header.shapes} == {"resampler", "adapter", "lora", "copies"}
    assert {f"adapter.{BLOCK}.to_k.weight", f"copies.{BLOCK}.to_v.down", f"lora.{BLOCK}.attn1.to_q.up"} <= set(
        header.shapes
    )
    again = read_encoder(path)
    assert again.metadata["modelspec.title"] == "face" and again.name == "slim.safetensors"
    same_tensors(encoder_tensors(again), encoder_tensors(encoder))


def test_a_slim_file_is_not_replaced_unasked(authors, saved, tmp_path):
    encoder = read_encoder(saved(authors()))
    path = write_encoder(tmp_path / "slim.safetensors", encoder, {})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="slim.safetensors exists already"):
        write_encoder(path, encoder, {})
    encoder.adapter[BLOCK][0][0, 0] = 1e6
    with pytest.raises(FormatError, match="float16 cannot hold; save it in float32"):
        write_encoder(path, encoder, {}, overwrite=True)
    assert path.read_bytes() == before and [path.name for path in tmp_path.glob("*.safetensors")] == [path.name]
    write_encoder(path, encoder, {}, dtype=torch.float32, overwrite=True)
    assert read_encoder(path).adapter[BLOCK][0][0, 0] == 1e6


def test_scales_are_folded_into_the_slim_file(authors, saved, tmp_path):
    encoder = read_encoder(saved(authors()))
    module = f"{BLOCK}.attn1.to_q"
    delta = encoder.lora[module]
    encoder.lora[module] = LowRankDelta(delta.down, delta.up, 0.5)
    again = read_encoder(write_encoder(tmp_path / "slim.safetensors", encoder, {}, dtype=torch.float32))
    assert torch.equal(again.lora[module].up, delta.up * 0.5)


def test_several_gpus_prefix_and_old_archives(authors, saved):
    tensors = authors()
    expected = encoder_tensors(read_encoder(saved(tensors)))
    prefixed = {f"module.{key}": tensor for key, tensor in tensors.items()}
    same_tensors(encoder_tensors(read_encoder(saved(prefixed))), expected)
    old = saved(tensors, _use_new_zipfile_serialization=False)
    same_tensors(encoder_tensors(read_encoder(old)), expected)


def test_the_authors_full_size_file_fits_and_shrinks_as_recorded(recorded_keys, load_helper, tmp_path, monkeypatch):
    # The comparison of the copies' values would read a gigabyte of zeros.
    monkeypatch.setattr(authors_file, "deviation", lambda found, expected: (0.0, True))
    shapes = {key: tuple(shape) for key, shape, _ in recorded_keys["keys"]}
    tensors, _ = map_weights(load_helper("tiny/full_size.py").write_hollow(tmp_path / "full.safetensors", shapes))
    checkpoint = authors_file.sort_checkpoint(tensors, "model_ckpt.pt")
    kinds = {kind: {key for key, _, one in recorded_keys["keys"] if one == kind} for kind in recorded_keys["totals"]}
    assert {f"encoder_unet.{name}" for name in checkpoint.base} == kinds["sdxl_base"]
    assert checkpoint.vision_parameters == recorded_keys["totals"]["image_encoder"]["params"]
    assert set(checkpoint.blocks) == set(SDXL_BLOCKS)
    slim = checkpoint.trained()
    for block in checkpoint.blocks:
        slim |= checkpoint.copies(block)
    used = ("encoder_lora", "kvcopy_lora", "extract_kv2", "image_proj_model")
    assert len(slim) == sum(len(kinds[kind]) for kind in used)
    numbers = sum(tensor.numel() for tensor in slim.values())
    assert numbers == recorded_keys["sizes"]["slim_params"] == 430_833_920
    assert 2 * numbers == recorded_keys["sizes"]["slim_bytes_fp16"] == 861_667_840


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory no file backs")
def test_a_full_size_file_is_read_without_what_is_frozen(recorded_keys, load_helper, tmp_path):
    shapes = {key: tuple(shape) for key, shape, _ in recorded_keys["keys"]}
    path = load_helper("tiny/full_size.py").write_hollow(tmp_path / "full.safetensors", shapes)
    before = anonymous_memory()
    encoder = read_encoder(path)
    assert anonymous_memory() - before < 1.1 * recorded_keys["sizes"]["slim_bytes_fp16"]
    shapes = {key.removeprefix("encoder_unet.").removesuffix(".weight"): shape for key, shape in shapes.items()}
    encoder.check_fit(shapes)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024


# --- ip-adapter files


@pytest.mark.parametrize("layout", ["nested .bin", "flat .safetensors"])
def test_an_ip_adapter_file_is_an_untrained_encoder(ip_adapter, saved, tmp_path, layout):
    contents = ip_adapter()
    if layout == "nested .bin":
        path = saved(contents, "ip-adapter-plus-face.bin")
    else:
        path = tmp_path / "ip-adapter-plus-face.safetensors"
        save_file({f"{part}.{key}": value for part in contents for key, value in contents[part].items()}, path)
    encoder = read_encoder(path, FOUR_BLOCKS)
    assert not encoder.trained and encoder.lora == {} and set(encoder.copies.values()) == {(None, None)}
    assert tuple(encoder.adapter) == FOUR_BLOCKS
    for number, block in enumerate(FOUR_BLOCKS):
        for tensor, which in zip(encoder.adapter[block], ("to_k", "to_v")):
            assert torch.equal(tensor, contents["ip_adapter"][f"{2 * number + 1}.{which}_ip.weight"])
    assert torch.equal(encoder.resampler.proj_in.bias, contents["image_proj"]["proj_in.bias"])


def test_layers_are_numbered_as_the_authors_number_them(recorded_keys):
    mapping = recorded_keys["ip_adapter_plus_face_sdxl_vit_h"]["mapping"]
    assert [entry["ckpt_index"] for entry in mapping] == list(range(1, 140, 2))
    assert [f"encoder_unet.{block}.extract_kv2" for block in SDXL_BLOCKS] == [entry["module"] for entry in mapping]


def test_a_full_size_ip_adapter_file_needs_no_list_of_blocks(ip_adapter, saved):
    encoder = read_encoder(saved(ip_adapter(70), "plus.bin"))
    assert tuple(encoder.adapter) == SDXL_BLOCKS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(image_proj={"proj.weight": torch.ones(2, 2)}), "a plain IP-Adapter has none"),
        (
            lambda c: c["ip_adapter"].update({"0.to_q_lora.down.weight": torch.ones(2, 2)}),
            "FaceID files are of another",
        ),
        (lambda c: c["ip_adapter"].pop("3.to_v_ip.weight"), "layer 3 of the adapter is incomplete"),
        (lambda c: c["ip_adapter"].pop("7.to_k_ip.weight"), "layer 7 of the adapter is incomplete"),
        (lambda c: c["ip_adapter"].update({"2.to_k_ip.weight": torch.ones(6, 5)}), "of the adapter is incomplete"),
        (lambda c: c["ip_adapter"].clear(), "found 18 tensors of something else"),
    ],
)
def test_other_adapters_are_refused(ip_adapter, saved, change, said):
    contents = ip_adapter()
    change(contents)
    with pytest.raises(FormatError, match=said) as raised:
        read_encoder(saved(contents, "some.bin"), FOUR_BLOCKS)
    assert str(raised.value).startswith("some.bin: ")


@pytest.mark.parametrize(("found", "blocks", "expected"), [(4, None, 70), (70, FOUR_BLOCKS, 4), (3, FOUR_BLOCKS, 4)])
def test_an_adapter_for_a_unet_of_another_depth_is_refused(ip_adapter, saved, found, blocks, expected):
    with pytest.raises(IncompatibleModelError, match=f"some.bin: .* {found} transformer blocks, expected {expected};"):
        read_encoder(saved(ip_adapter(found), "some.bin"), blocks)


# --- files that are damaged, hostile or something else


def replaced(name, made):
    return lambda tensors: tensors.update({name: made(tensors[name])})


def removed(name):
    return lambda tensors: tensors.pop(name)


LORA = f"{IN_FILE}.attn1.to_q.lora_layer"
COPY = f"{IN_FILE}.extract_kv1.to_k.lora_layer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (removed(f"{IN_FILE}.extract_kv2.to_v.weight"), "lacks extract_kv2.to_v.weight"),
        (removed(f"{IN_FILE}.extract_kv1.to_k.weight"), "lacks extract_kv1.to_k.weight"),
        (removed(f"{LORA}.up.weight"), "lacks attn1.to_q.lora_layer.up.weight"),
        (removed(f"{COPY}.down.weight"), "lacks extract_kv1.to_k.lora_layer.down.weight"),
        (removed(f"{IN_FILE}.attn1.to_k.weight"), "lacks attn1.to_k.weight"),
        (removed("image_proj_model.latents"), "no IP-Adapter Plus resampler"),
        (replaced(f"{LORA}.down.weight", lambda t: t[:1]), "rank, in. and .out, rank"),
        (replaced(f"{COPY}.up.weight", lambda t: t[:, :2]), "rank, in. and .out, rank"),
        (replaced(f"{COPY}.up.weight", lambda t: t[:5]), r"extract_kv1.to_k.lora_layer.up.weight is \(5, 3\)"),
        (replaced(f"{LORA}.down.weight", lambda t: t.sum()), r"is \(\), expected \(1, 6\)"),
        (replaced(f"{IN_FILE}.extract_kv1.to_v.weight", lambda t: t[:, :4]), r"is \(6, 4\), expected \(6, 6\)"),
        (replaced(f"{IN_FILE}.extract_kv2.to_v.weight", lambda t: t[:, :4]), r"is \(6, 4\), expected \(6, 5\)"),
        (replaced(f"{IN_FILE}.extract_kv2.to_k.weight", lambda t: t * torch.nan), "no numbers"),
        (replaced(f"{LORA}.up.weight", lambda t: t / 0), "no numbers"),
        (replaced("image_proj_model.proj_in.bias", lambda t: t.int()), "is int32, expected 16-bit"),
        (replaced("encoder_unet.conv_in.bias", lambda t: t.int()), "int32, expected floating point"),
        (replaced(f"{IN_FILE}.extract_kv2.to_k.weight", lambda t: torch.ones(1, 1).expand(6, 5)), "no ordinary tensor"),
        (replaced(f"{IN_FILE}.extract_kv2.to_k.weight", lambda t: t.to_sparse()), "no ordinary tensor"),
        (lambda t: t.update({"optimizer.step": torch.ones(1)}), "optimizer.step is unknown"),
        (lambda t: t.update({"encoder_unet.proj.lora_layer.up.weight": torch.ones(1)}), "is unknown"),
        (lambda t: t.update({f"{IN_FILE}.extract_kv2.to_q.weight": torch.ones(1)}), "has extract_kv2.to_q.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused(authors, saved, change, said):
    tensors = authors()
    change(tensors)
    with pytest.raises(FormatError, match=said) as raised:
        read_encoder(saved(tensors))
    assert str(raised.value).startswith("model_ckpt.pt: ")


def test_a_checkpoint_that_lacks_a_block_is_refused(authors, saved):
    tensors = {key: t for key, t in authors().items() if not key.startswith(f"{IN_FILE}.extract_kv")}
    with pytest.raises(FormatError, match="lacks extract_kv1.to_k.weight"):
        read_encoder(saved(tensors))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (removed(f"adapter.{BLOCK}.to_v.weight"), f"{BLOCK} has to_k without to_v"),
        (removed(f"copies.{BLOCK}.to_k.up"), "has down, expected down and up"),
        (removed(f"lora.{BLOCK}.attn1.to_q.down"), "has up, expected down and up"),
        (lambda t: [t.pop(f"adapter.{BLOCK}.{which}.weight") for which in ("to_k", "to_v")], "have no adapter"),
        (lambda t: [t.pop(key) for key in list(t) if not key.startswith("resampler.")], "have no adapter"),
        (replaced(f"adapter.{BLOCK}.to_v.weight", lambda t: t[:, :4]), "expected two matrices for tokens of 5"),
        (replaced(f"copies.{BLOCK}.to_v.up", lambda t: t[:5]), "expected 6 rows of both"),
        (replaced(f"copies.{BLOCK}.to_v.up", lambda t: t[:, :1]), "rank, in. and .out, rank"),
        (replaced(f"copies.{BLOCK}.to_v.up", lambda t: t.to(torch.float8_e4m3fn)), "float8_e4m3fn, expected 16-bit"),
        (replaced("resampler.proj_out.bias", lambda t: t[:2]), "resampler.proj_out.bias"),
        (lambda t: t.update({f"lora.{BLOCK}.ff.net.0.down": torch.ones(1, 1)}), "is no part of an encoder"),
        (lambda t: t.update({"adapter.nowhere.to_k.weight": torch.ones(1, 1)}), "is no part of an encoder"),
    ],
)
def test_a_damaged_slim_file_is_refused(authors, saved, tmp_path, change, said):
    path = write_encoder(tmp_path / "slim.safetensors", read_encoder(saved(authors())), {})
    tensors, metadata = load_file(path), read_header(path).metadata
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    with pytest.raises(FormatError, match=said) as raised:
        read_encoder(path)
    assert str(raised.value).startswith("slim.safetensors: ")


def test_files_that_are_cut_short_or_no_files_of_tensors(authors, saved, tmp_path):
    whole = saved(authors())
    slim = write_encoder(tmp_path / "slim.safetensors", read_encoder(whole), {})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:-200])
    short = tmp_path / "short.safetensors"
    short.write_bytes(slim.read_bytes()[:-200])
    lying = tmp_path / "lying.safetensors"
    header = json.dumps({"a": {"dtype": "F16", "shape": [1000], "data_offsets": [0, 4]}}).encode()
    lying.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    for path, said in (
        (cut, "refused, it is damaged"),
        (short, "truncated"),
        (lying, "damaged safetensors file"),
        (saved([1, 2], "list.pt"), "contains a list"),
        (saved({"a": torch.ones(2)}, "other.pt"), "found 1 tensors of something else, such as a; expected"),
        (tmp_path / "absent.pt", "could not be read"),
    ):
        with pytest.raises(FormatError, match=said) as raised:
            read_encoder(path)
        assert str(raised.value).startswith(f"{path.name}: ")


# --- another model


def test_an_encoder_fits_the_model_it_was_made_for_only(authors, saved):
    tensors = authors()
    encoder = read_encoder(saved(tensors))
    shapes = {
        key.removeprefix("encoder_unet.").removesuffix(".weight"): tuple(tensor.shape)
        for key, tensor in tensors.items()
        if "extract_kv" not in key
    }
    encoder.check_fit(shapes)
    for change, said in (
        (lambda s: s.pop(f"{BLOCK}.attn2.to_k"), "4 transformer blocks, this model has 3, such as down_blocks"),
        (lambda s: s.update({"mid_block.more.attn2.to_k": (6, 5)}), "this model has 5, such as mid_block.more"),
        (lambda s: s.update({f"{BLOCK}.attn2.to_k": (8, 5)}), "attn2.to_k is 6×5, this model has 8×5"),
        (lambda s: s.update({f"{BLOCK}.attn2.to_k": (6, 9)}), "attn2.to_k is 6×5, this model has 6×9"),
        (lambda s: s.update({f"{LAST}.attn1.to_k": (6, 7)}), "attn1.to_k is 6×6, this model has 6×7"),
        (lambda s: s.pop(f"{BLOCK}.attn1.to_q"), "this model has nothing of that name"),
    ):
        other = dict(shapes)
        change(other)
        with pytest.raises(IncompatibleModelError, match=said):
            encoder.check_fit(other)
