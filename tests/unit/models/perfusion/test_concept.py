"""The concept's file, several concepts together, and files that are none."""

from dataclasses import replace

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.formats import read_safetensors, write_safetensors
from comfyui_personalize.models.perfusion import (
    KEY,
    VALUE,
    concept_tensors,
    edit_space,
    read_concept,
    write_concept,
)

SIZES = {320: 5, 640: 5, 1280: 6}
"""How many cross-attention layers of SD1.5 have how many channels."""


@pytest.mark.parametrize("mode", ["paper", "positions"])
@pytest.mark.parametrize("keys", [False, True])
def test_the_file_is_read_as_written(make_concept, mode, keys, tmp_path):
    concept = make_concept(mode=mode, keys=keys)
    path = write_concept(tmp_path / "bear.safetensors", concept, config={"steps": 4}, extra={"workflow": "{}"})
    again = read_concept(path)
    assert (again.trigger, again.superclass, again.family) == ("<bear>", "teddy", "sd15")
    assert again.covariance == concept.covariance
    assert again.metadata["workflow"] == "{}" and '"steps": 4' in again.metadata["personalize.config"]
    assert again.parts.outputs.keys() == concept.parts.outputs.keys()
    for name, output in concept.parts.outputs.items():
        assert torch.equal(again.parts.outputs[name], output) and again.parts.outputs[name].dtype == torch.float32
    for name in ("target_input", "dual"):
        assert torch.equal(getattr(again.parts, name), getattr(concept.parts, name))
    assert keys or torch.equal(again.parts.superclass_input, concept.parts.superclass_input)
    assert torch.equal(again.embedding.rows["clip_l"], concept.embedding.rows["clip_l"])
    assert read_concept(path, "<rex>").trigger == "<rex>"


def test_a_full_size_concept_takes_less_than_a_hundred_kilobytes(make_concept, tmp_path):
    places = [out for out, count in SIZES.items() for _ in range(count)]
    shapes = {
        f"down_blocks.0.attentions.{index}.transformer_blocks.0{end}": (out, 768)
        for index, out in enumerate(places)
        for end in (KEY, VALUE)
    }
    assert len(shapes) == 32
    path = write_concept(tmp_path / "bear.safetensors", make_concept(dim=768, shapes=shapes))
    assert path.stat().st_size <= 50_000
    with_keys = write_concept(tmp_path / "keys.safetensors", make_concept(dim=768, shapes=shapes, keys=True))
    assert with_keys.stat().st_size <= 100_000


def test_directions_keep_their_precision(make_concept):
    concept = make_concept()
    vector = torch.full((8,), 1 + 2**-20)
    precise = replace(concept, parts=replace(concept.parts, target_input=vector, dual=vector))
    tensors = concept_tensors(precise)
    assert torch.equal(tensors.pop("target_input"), vector) and torch.equal(tensors.pop("target_input_dual"), vector)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_values_too_large_for_the_file_are_refused(make_concept, tmp_path):
    concept = make_concept()
    name = next(iter(concept.parts.outputs))
    concept.parts.outputs[name][0, 0] = 1e6
    with pytest.raises(FormatError, match="float16 cannot hold"):
        write_concept(tmp_path / "bear.safetensors", concept)
    assert not list(tmp_path.iterdir())
    path = write_concept(tmp_path / "bear.safetensors", concept, dtype=torch.float32)
    assert read_concept(path).parts.outputs[name][0, 0] == 1e6


def test_a_concept_of_unknown_family_is_not_written(make_concept, tmp_path):
    with pytest.raises(ConfigError, match="family is unknown"):
        write_concept(tmp_path / "bear.safetensors", replace(make_concept(), family=None))


def test_keys_answer_as_to_the_superclass(make_concept):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    stored, rebuilt = make_concept(keys=True), make_concept()
    for name in stored.parts.outputs:
        assert stored.target_output(name, None) is stored.parts.outputs[name]
        answer = rebuilt.target_output(name, lambda rows: rows @ weight.T)
        locked = rebuilt.parts.superclass_input @ weight.T
        assert torch.equal(answer, locked if name.endswith(KEY) else rebuilt.parts.outputs[name])


def test_concepts_fit_the_model_that_they_were_trained_on(make_concept):
    concept = make_concept()
    shapes = {name.removesuffix(VALUE) + end: (4, 8) for name in concept.parts.outputs for end in (KEY, VALUE)}
    concept.check_fit(shapes)
    name = next(iter(concept.parts.outputs))
    for wrong, message in (
        ({key: shape for key, shape in shapes.items() if key != name}, "2 cross-attention layers, this one has 1"),
        (shapes | {name: (5, 8)}, r"is \(4, 8\), this model has \(5, 8\)"),
        (shapes | {name: (4, 9)}, r"this model has \(4, 9\)"),
    ):
        with pytest.raises(IncompatibleModelError, match=message):
            concept.check_fit(wrong)


def test_concepts_of_different_covariances_are_not_combined(make_concept):
    first, second = make_concept(), make_concept(trigger="<cat>", seed=1)
    assert edit_space([first, second], [0.6, 0.75], [0.15, 0.1]).basis.shape == (2, 8)
    with pytest.raises(IncompatibleModelError, match="different covariances"):
        edit_space([first, replace(second, covariance="f" * 16)], [0.6, 0.75], [0.15, 0.1])


def test_each_concept_needs_its_own_word_and_gate(make_concept):
    with pytest.raises(ConfigError, match="<bear> is used twice"):
        edit_space([make_concept(), make_concept(seed=1)], [0.6, 0.75], [0.15, 0.1])
    with pytest.raises(ConfigError, match="1 concepts have 2 betas"):
        edit_space([make_concept()], [0.6, 0.75], [0.15])


def rewritten(path, change):
    tensors, metadata = read_safetensors(path)
    change(tensors, metadata)
    return write_safetensors(path, tensors, metadata, overwrite=True)


VALUE_OUTPUT = "target_output.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("target_input"), "incomplete"),
        (lambda t, m: t.pop("target_input_dual"), "incomplete"),
        (lambda t, m: t.pop("superclass_input"), "incomplete"),
        (lambda t, m: t.update({"lora_down": torch.ones(2, 2)}), "no part of"),
        (lambda t, m: t.update({"target_output.text_model.to_v": torch.ones(1, 4)}), "no part of"),
        (lambda t, m: t.update({VALUE_OUTPUT.replace("to_v", "to_k"): torch.ones(1, 4)}), "incomplete"),
        (lambda t, m: t.update({VALUE_OUTPUT: torch.ones(4)}), "which no concept has"),
        (lambda t, m: t.update({VALUE_OUTPUT: torch.ones(0, 4)}), "which no concept has"),
        (lambda t, m: t.update({VALUE_OUTPUT: torch.full((1, 4), torch.nan)}), "no numbers"),
        (lambda t, m: t.update({VALUE_OUTPUT: torch.ones(1, 4, dtype=torch.int8)}), "16-bit or 32-bit"),
        (lambda t, m: t.update({"target_input": torch.ones(3)}), "which no concept has"),
        (lambda t, m: t.update({"superclass_input": torch.ones(1, 3)}), "which no concept has"),
        (lambda t, m: t.update({"target_input_dual": -t["target_input"]}), "no positive energy"),
        (lambda t, m: m.pop("personalize.covariance"), "no covariance"),
        (lambda t, m: m.update({"personalize.tokens": "[]"}), "names 0 words"),
        (lambda t, m: m.update({"personalize.tokens": "{"}), "damaged"),
        (lambda t, m: t.pop("bundle_emb.bear.clip_l"), "expected one"),
        (lambda t, m: t.update({"bundle_emb.cat.clip_l": torch.ones(1, 8)}), "holds 2 words"),
        (lambda t, m: m.update({"personalize.format": "lora/1"}), "found lora/1, expected perfusion-concept/1"),
        (lambda t, m: m.pop("personalize.format"), "another tool"),
    ],
)
def test_damaged_files_are_refused(make_concept, change, message, tmp_path):
    path = write_concept(tmp_path / "bear.safetensors", make_concept())
    with pytest.raises(FormatError, match=message) as refusal:
        read_concept(rewritten(path, change))
    assert len(str(refusal.value)) < 400


def test_truncated_and_missing_files_are_refused(make_concept, tmp_path):
    path = write_concept(tmp_path / "bear.safetensors", make_concept())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match="truncated"):
        read_concept(path)
    for name in ("missing.safetensors", "missing.ckpt"):
        with pytest.raises(FormatError, match="missing"):
            read_concept(tmp_path / name)
