"""Low-rank changes: their arithmetic, and the layouts in which files carry them."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)

from comfyui_personalize.models.errors import FormatError
from comfyui_personalize.models.lora import LowRankDelta, diffusers_tensors, kohya_tensors, parse_lora

RANK, ALPHA = 3, 6.0
ATTENTION = "{root}.{module}.transformer_blocks.0.attn1.{layer}"


def linear(rank: int = RANK, inner: int = 5, outer: int = 7, scale: float = ALPHA / RANK, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator)
    return LowRankDelta(down, up, scale)


@pytest.fixture
def deltas():
    modules = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.2")
    names = [
        ATTENTION.format(root="unet", module=module, layer=layer)
        for module in modules
        for layer in ("to_q", "to_out.0")
    ]
    names += [f"{root}.text_model.encoder.layers.1.self_attn.out_proj" for root in ("text_encoder", "text_encoder_2")]
    return {name: linear(seed=seed) for seed, name in enumerate(names)}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        change = got[name].up.flatten(1) @ got[name].down.flatten(1) * got[name].scale
        torch.testing.assert_close(change, expected[name].up @ expected[name].down * expected[name].scale)


# Arithmetic


def test_a_linear_change_is_the_dense_matrix():
    delta, x = linear(), torch.randn(2, 4, 5)
    torch.testing.assert_close(delta.linear(x), F.linear(x, delta.up @ delta.down * delta.scale), rtol=1e-4, atol=1e-5)


def test_up_at_zero_changes_nothing():
    delta = linear()
    silent = LowRankDelta(delta.down, torch.zeros_like(delta.up), delta.scale)
    assert silent.linear(torch.randn(2, 5)).abs().max() == 0
    assert LowRankDelta(delta.down, delta.up, 0.0).linear(torch.randn(2, 5)).abs().max() == 0


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tucker", [False, True])
def test_a_convolution_change_is_the_dense_kernel(kernel, stride, tucker):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x, up = draw(2, 5, 9, 8), draw(7, RANK, 1, 1)
    how = {"stride": stride, "padding": kernel // 2, "dilation": 1}
    if tucker:
        down, mid = draw(RANK, 5, 1, 1), draw(RANK, RANK, kernel, kernel)
        dense = torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    else:
        down, mid = draw(RANK, 5, kernel, kernel), None
        dense = torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    got = LowRankDelta(down, up, 0.5, mid).conv2d(x, **how)
    torch.testing.assert_close(got, F.conv2d(x, 0.5 * dense, **how), rtol=1e-4, atol=1e-4)


def test_a_pointwise_convolution_stored_for_a_linear_layer_still_fits_it():
    delta, x = linear(), torch.randn(2, 4, 5)
    stored = LowRankDelta(delta.down[..., None, None], delta.up[..., None, None], delta.scale)
    torch.testing.assert_close(stored.linear(x), delta.linear(x))


def test_moving_takes_all_parts_along():
    mid = torch.randn(RANK, RANK, 3, 3)
    moved = LowRankDelta(torch.randn(RANK, 5, 1, 1), torch.randn(7, RANK, 1, 1), 2.0, mid).to(torch.zeros(1).double())
    assert {moved.down.dtype, moved.up.dtype, moved.mid.dtype} == {torch.float64}
    assert (moved.scale, moved.rank) == (2.0, RANK)


# Layouts

LAYOUTS = {
    "diffusers": ("unet.{}", ".lora_A.weight", ".lora_B.weight"),
    "peft in a model": ("unet.{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft file": ("base_model.model.{}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers 0.2x": ("unet.{}", ".lora.down.weight", ".lora.up.weight"),
    "without root": ("{}", ".lora.down.weight", ".lora.up.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_without_alpha_have_scale_one(layout):
    module = ATTENTION.format(root="unet", module="down_blocks.1.attentions.0", layer="to_out.0")
    stem, down, up = LAYOUTS[layout]
    stem = stem.format(module.removeprefix("unet."))
    delta = linear(scale=1.0)
    parsed = parse_lora({stem + down: delta.down, stem + up: delta.up})
    assert_same(parsed, {module: delta})
    assert parsed[module].scale == 1.0


def test_attention_processor_names_of_old_files():
    delta = linear(scale=1.0)
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor."
    tensors = {}
    for layer in ("to_q", "to_out"):
        tensors |= {f"{stem}{layer}_lora.down.weight": delta.down, f"{stem}{layer}_lora.up.weight": delta.up}
    names = ("to_q", "to_out.0")
    module = "down_blocks.1.attentions.0"
    assert_same(parse_lora(tensors), {ATTENTION.format(root="unet", module=module, layer=n): delta for n in names})


@pytest.mark.parametrize("layer", ["q_proj", "out_proj"])
def test_text_encoder_names_of_old_files(layer):
    delta = linear(scale=1.0)
    attention = "text_encoder.text_model.encoder.layers.0.self_attn"
    as_processor = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}[layer]
    for stem in (f"{attention}.{layer}.lora_linear_layer", f"{attention}.{as_processor}"):
        tensors = {f"{stem}.down.weight": delta.down, f"{stem}.up.weight": delta.up}
        assert_same(parse_lora(tensors), {f"{attention}.{layer}": delta})


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_kohya_files_are_read_back(deltas, family):
    if family != "sdxl":
        deltas = {name: delta for name, delta in deltas.items() if not name.startswith("text_encoder_2")}
    tensors = kohya_tensors(deltas, family)
    assert len(tensors) == 3 * len(deltas)
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {ALPHA}
    prefixes = {key.split("_")[1] for key in tensors}
    assert prefixes == ({"unet", "te1", "te2"} if family == "sdxl" else {"unet", "te"})
    assert any("input_blocks_4_1" in key for key in tensors) == (family == "sdxl")
    parsed = parse_lora(tensors)
    assert_same(parsed, deltas)
    assert {delta.scale for delta in parsed.values()} == {ALPHA / RANK}


def test_kohya_keeps_the_core_of_a_tucker_convolution_and_diffusers_refuses_it():
    delta = LowRankDelta(torch.randn(RANK, 5, 1, 1), torch.randn(7, RANK, 1, 1), 1.0, torch.randn(RANK, RANK, 3, 3))
    deltas = {"unet.mid_block.resnets.0.conv1": delta}
    parsed = parse_lora(kohya_tensors(deltas, "sd15"))
    torch.testing.assert_close(parsed["unet.mid_block.resnets.0.conv1"].mid, delta.mid)
    with pytest.raises(FormatError, match="Tucker"):
        diffusers_tensors(deltas)


def test_diffusers_files_carry_the_scale_in_up(deltas):
    tensors = diffusers_tensors(deltas)
    assert len(tensors) == 2 * len(deltas)
    parsed = parse_lora(tensors)
    assert_same(parsed, deltas)
    assert {delta.scale for delta in parsed.values()} == {1.0}


def test_bundled_tokens_are_passed_over(deltas):
    tensors = kohya_tensors(deltas, "sdxl") | {"bundle_emb.dog.clip_l": torch.zeros(1, 4)}
    assert_same(parse_lora(tensors), deltas)


@pytest.mark.parametrize(
    "extra",
    ["unet.conv_in.weight", "lora_unet_mid_block.hada_w1_a", "unet.x.dora_scale", "x.lora_magnitude_vector", "alpha"],
)
def test_what_is_no_plain_lora_is_refused_not_dropped(deltas, extra):
    with pytest.raises(FormatError, match="not of a plain LoRA"):
        parse_lora(kohya_tensors(deltas, "sdxl") | {extra: torch.zeros(1)})


def test_half_a_pair_is_refused(deltas):
    tensors = kohya_tensors(deltas, "sdxl")
    ups = [key for key in tensors if key.endswith("lora_up.weight")]
    downs = [key for key in tensors if key.endswith("lora_down.weight")]
    with pytest.raises(FormatError, match="has no partner"):
        parse_lora({key: value for key, value in tensors.items() if key != ups[0]})
    with pytest.raises(FormatError, match="not of a plain LoRA"):
        parse_lora({key: value for key, value in tensors.items() if key != downs[0]})


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("lora_down.weight", torch.zeros(0, 5), "is 0×5, expected a matrix"),
        ("lora_down.weight", torch.zeros(5), "is 5, expected a matrix"),
        ("lora_up.weight", torch.tensor(1.0), "is a single number, expected a matrix"),
        ("lora_up.weight", torch.zeros(7, RANK + 1), "differ in rank"),
        ("lora_mid.weight", torch.zeros(RANK), "expected a matrix"),
        ("lora_mid.weight", torch.zeros(RANK, RANK + 1, 3, 3), "differ in rank"),
        ("alpha", torch.zeros(3), "is not a finite number"),
        ("alpha", torch.tensor(float("nan")), "is not a finite number"),
    ],
)
def test_damaged_parts_are_refused_by_name(deltas, part, tensor, reason):
    tensors = kohya_tensors(deltas, "sdxl")
    stem = next(iter(tensors)).split(".")[0]
    with pytest.raises(FormatError, match=f"dog.safetensors: {stem}.*{reason}"):
        parse_lora(tensors | {f"{stem}.{part}": tensor}, "dog.safetensors")


def test_numbers_in_a_list_of_one_are_taken_for_alpha(deltas):
    tensors = kohya_tensors(deltas, "sdxl")
    listed = {key: value.reshape(1) if key.endswith(".alpha") else value for key, value in tensors.items()}
    assert_same(parse_lora(listed), deltas)


# diffusers' converters


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_converts_our_kohya_files(deltas, family):
    text = ("text_encoder",) if family == "sd15" else ("text_encoder", "text_encoder_2")
    deltas = {name: delta for name, delta in deltas.items() if name.startswith(("unet.", *(f"{t}." for t in text)))}
    tensors = kohya_tensors(deltas, family)
    if family == "sdxl":
        with torch.device("meta"):
            config = diffusers.UNet2DConditionModel(layers_per_block=2).config
        tensors = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), config)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    parsed = parse_lora(converted)
    assert parsed.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(parsed[name].down, delta.down)
        torch.testing.assert_close(parsed[name].up, delta.up)
    assert len(alphas) == len(deltas) and set(alphas.values()) == {ALPHA}
