"""Conversion of the authors' checkpoint: what is kept, what is compared, and that the rest stays in the file."""

import sys

import pytest
import torch

from comfyui_personalize.models.errors import FormatError, IncompatibleModelError
from comfyui_personalize.models.lookahead.authors_file import deviation
from comfyui_personalize.models.lookahead.convert import convert_checkpoint
from comfyui_personalize.models.lookahead.encoder import encoder_tensors, read_encoder, write_encoder

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LARGE = 48 * 2**20
"""Numbers of the frozen tensor that must not be read."""


@pytest.fixture
def base_of():
    """base_of(tensors, dtype) -> the UNet that such a checkpoint was trained from, by diffusers' names."""

    def frozen(tensors, dtype=torch.float16):
        unet = {key.removeprefix("encoder_unet."): tensor for key, tensor in tensors.items() if "encoder_unet." in key}
        added = ("extract_kv", "lora_layer")
        return {key: t.to(dtype, copy=True) for key, t in unet.items() if not any(part in key for part in added)}

    return frozen


def test_what_is_kept_is_what_the_loader_reads(authors, saved, tmp_path):
    path = saved(authors())
    encoder, report = convert_checkpoint(path)
    expected = encoder_tensors(read_encoder(path))
    found = encoder_tensors(read_encoder(write_encoder(tmp_path / "slim.safetensors", encoder, {})))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert {tensor.dtype for pair in encoder.adapter.values() for tensor in pair} == {torch.float16}
    assert report.kept == sum(tensor.numel() for tensor in found.values())
    assert "model_ckpt.pt: kept" in str(report) and "was not compared with a base model" in str(report)


def test_what_is_left_out_is_counted_once(authors, saved):
    tensors = authors()
    _, report = convert_checkpoint(saved(tensors))
    stored = sum(tensor.numel() for key, tensor in tensors.items() if "source_attention_block" not in key)
    assert report.kept + report.left_out == stored and report.full_copies == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_in_another_precision_is_the_same_base(authors, saved, base_of, dtype):
    tensors = authors()
    base = base_of(tensors, dtype)
    _, report = convert_checkpoint(saved(tensors), base)
    assert report.compared == len(base) and report.differing == ()
    assert (report.largest == 0) == (dtype is torch.float32)
    assert f"All {len(base)} frozen weights are the base model's" in str(report)


def test_another_base_is_said_to_be_one(authors, saved, base_of):
    tensors = authors()
    base = base_of(tensors)
    base["conv_in.bias"][1] += 0.25
    base[f"{BLOCK}.attn1.to_q.weight"][0, 0] *= 1.01
    _, report = convert_checkpoint(saved(tensors), base)
    assert set(report.differing) == {"conv_in.bias", f"{BLOCK}.attn1.to_q.weight"}
    assert report.largest == pytest.approx(0.25, abs=1e-3)
    assert f"2 of {len(base)} frozen weights differ" in str(report) and "conv_in.bias" in str(report)
    base["conv_in.bias"][1] = torch.nan
    _, report = convert_checkpoint(saved(tensors), base)
    assert report.largest == torch.inf and len(report.differing) == 2


def test_one_step_of_the_coarser_precision_is_rounding_and_two_are_not():
    exact = torch.tensor([1.0, -300.0, 0.0, 1e-6])
    eps = torch.finfo(torch.float16).eps
    for steps, expected in ((0, True), (0.99, True), (2, False)):
        assert deviation(exact.half(), exact.half().float() * (1 + steps * eps))[1] is expected
    assert deviation(exact, exact.clone()) == (0.0, True)
    assert not deviation(exact, exact * (1 + 1e-6))[1]


def test_copies_of_their_own_are_reported(authors, saved):
    tensors = authors()
    tensors[f"encoder_unet.{BLOCK}.extract_kv1.to_v.weight"] += 1
    encoder, report = convert_checkpoint(saved(tensors))
    assert report.full_copies == 1 and "1 blocks have keys and values of their own" in str(report)
    assert isinstance(encoder.copies[BLOCK][0], torch.Tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: base.pop("conv_in.bias"), "differ in 1 weights' names or shapes, such as conv_in.bias"),
        (lambda base: base.update({"conv_out.bias": torch.ones(4)}), "such as conv_out.bias"),
        (lambda base: base.update({"conv_in.bias": torch.ones(9)}), "such as conv_in.bias"),
        (lambda base: base.clear(), "differ in"),
    ],
)
def test_a_base_of_another_kind_is_refused_before_anything_is_read(authors, saved, base_of, change, said):
    tensors, calls = authors(), []
    base = base_of(tensors)
    change(base)
    with pytest.raises(IncompatibleModelError, match=said):
        convert_checkpoint(saved(tensors), base, lambda *step: calls.append(step))
    assert calls == []


def test_a_quantized_base_is_refused(authors, saved, base_of):
    tensors = authors()
    base = base_of(tensors)
    base["conv_in.weight"] = base["conv_in.weight"].to(torch.int8)
    with pytest.raises(IncompatibleModelError, match="conv_in.weight is int8"):
        convert_checkpoint(saved(tensors), base)


def test_files_that_need_no_conversion(authors, ip_adapter, saved, tmp_path):
    slim = write_encoder(tmp_path / "slim.safetensors", read_encoder(saved(authors())), {})
    for path in (slim, saved(ip_adapter(), "plus.bin")):
        with pytest.raises(FormatError, match=f"{path.name}: found no checkpoint of LCM-Lookahead's authors"):
            convert_checkpoint(path)


def test_progress_counts_every_piece_of_work_and_can_end_it(authors, saved, base_of):
    tensors, steps = authors(), []
    base = base_of(tensors)
    convert_checkpoint(saved(tensors), base, lambda *step: steps.append(step))
    total = 4 + len(base)
    assert steps == [(done, total) for done in range(total + 1)]

    def cancel(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(saved(tensors), base, cancel)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory no file backs")
def test_what_is_frozen_stays_in_the_file(authors, saved):
    frozen = torch.zeros(LARGE)
    path = saved(authors() | {"image_encoder.large": frozen})
    del frozen
    before, seen = anonymous_memory(), []
    encoder, report = convert_checkpoint(path, progress=lambda *step: seen.append(anonymous_memory()))
    assert report.left_out > LARGE and encoder.trained
    assert max(seen) - before < LARGE  # a quarter of the tensor's bytes


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024
