"""Reading learned tokens: whose they are, how rows are divided, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.learned_embeddings import (
    ANY,
    LearnedEmbedding,
    declared_tokens,
    files_of_tokens,
    parse_triggers,
    read_learned_embeddings,
    tokens_of_lora,
    trigger_of_file,
)


def test_triggers_from_a_widget():
    assert parse_triggers(" <dog>, hat\n<cat> ") == ["<dog>", "<hat>", "<cat>"]
    assert parse_triggers("") == []
    with pytest.raises(ConfigError):
        parse_triggers("<a:b>")


def test_a_file_without_names_is_called_like_itself_or_its_folder(tmp_path):
    assert trigger_of_file(tmp_path / "my dog (2).pt") == "<my-dog-2>"
    assert trigger_of_file(tmp_path / "rex" / "learned_embeds.safetensors") == "<rex>"


def test_rows_are_divided_as_the_metadata_says(tmp_path):
    rows = {"clip_l": torch.arange(6.0).view(3, 2), "clip_g": torch.arange(12.0).view(3, 4)}
    tokens = [{"trigger": "<dog>", "initializer": "dog", "rows": 2}, {"trigger": "<cat>", "rows": 1}]
    save_file(rows, tmp_path / "t.safetensors", {"personalize.tokens": json.dumps(tokens)})
    dog, cat = read_learned_embeddings(tmp_path / "t.safetensors")
    assert (dog.trigger, cat.trigger) == ("<dog>", "<cat>")
    assert torch.equal(dog.rows["clip_l"], rows["clip_l"][:2]) and torch.equal(cat.rows["clip_g"], rows["clip_g"][2:])


def test_the_authors_file_gives_one_row_to_each_name(tmp_path):
    path = tmp_path / "rex" / "learned_embeds.safetensors"
    path.parent.mkdir()
    save_file({"clip_l": torch.eye(2), "clip_g": torch.eye(2)}, path)
    assert [len(e.rows["clip_l"]) for e in read_learned_embeddings(path)] == [2]
    first, second = read_learned_embeddings(path, ["<a>", "<b>"])
    assert first.rows["clip_l"].tolist() == [[1, 0]] and second.rows["clip_g"].tolist() == [[0, 1]]
    with pytest.raises(ConfigError, match="holds 2 rows, but 3 tokens"):
        read_learned_embeddings(path, ["<a>", "<b>", "<c>"])


def test_rows_of_two_encoders_that_disagree_are_refused(tmp_path):
    save_file({"clip_l": torch.eye(2), "clip_g": torch.eye(3)}, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match="t.safetensors holds 2 rows"):
        read_learned_embeddings(tmp_path / "t.safetensors")


def test_bundled_names_are_matched_with_the_declared_triggers(tmp_path):
    tensors = {"bundle_emb.Dog.clip_l": torch.eye(2), "bundle_emb.v1.2.clip_l": torch.eye(2)}
    save_file(tensors, tmp_path / "l.safetensors", {"personalize.tokens": "<dog>"})
    assert {e.trigger for e in read_learned_embeddings(tmp_path / "l.safetensors")} == {"<dog>", "<v1.2>"}


def test_damaged_metadata_is_named():
    for damaged in ('[{"rows": 1}]', "[", '["x y"]', '[{"trigger": 5}]', '[{"trigger": "<a>", "rows": 0}]'):
        with pytest.raises(FormatError, match="personalize.tokens is damaged"):
            declared_tokens({"personalize.tokens": damaged})
    assert declared_tokens({}) == []
    assert declared_tokens({"personalize.tokens": "<a>, <b>"}) == [("<a>", None), ("<b>", None)]


@pytest.mark.parametrize("contents", [{"string_to_param": {}}, {"a.b": torch.ones(2)}, {}])
def test_files_with_nothing_to_learn_from_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="x.pt"):
        read_learned_embeddings(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.tensor(1.0), "are a single number"),
        (torch.zeros(1, 1, 4), "are 1×1×4"),
        (torch.zeros(0, 4), "are 0×4"),
        (torch.ones(1, 4, dtype=torch.int64), "of torch.int64"),
        (torch.tensor([[1.0, float("nan")], [1.0, 1.0]]), "no numbers"),
        (torch.tensor([float("inf")], dtype=torch.float16), "no numbers"),
    ],
)
def test_damaged_rows_are_refused(tmp_path, rows, reason, suffix):
    path = tmp_path / f"dog.{suffix}"
    for key in ("clip_l", "emb_params", "bundle_emb.dog.clip_l"):
        save_file({key: rows}, path) if suffix == "safetensors" else torch.save({key: rows}, path)
        with pytest.raises(FormatError, match=f"dog.{suffix}: .*{reason}"):
            read_learned_embeddings(path)


DECLARED = {"personalize.tokens": json.dumps([{"trigger": "<dog>"}, {"trigger": "<hat>"}])}


def test_a_lora_whose_tokens_are_not_to_be_found_is_refused(tmp_path):
    path = tmp_path / "my_dog.safetensors"
    with pytest.raises(FormatError, match="my_dog.safetensors was trained with <dog>, <hat>") as refusal:
        tokens_of_lora(path, {}, DECLARED, ())
    assert "put my_dog_dog.safetensors and my_dog_hat.safetensors into the embeddings folder" in str(refusal.value)
    with pytest.raises(ConfigError, match="carries no learned tokens, but <dog> should name some"):
        tokens_of_lora(path, {}, {}, (), ["<dog>"])
    assert tokens_of_lora(path, {}, {}, ()) == []


def test_the_tokens_of_a_lora_come_from_files_or_from_itself(tmp_path):
    lora = tmp_path / "my_dog.safetensors"
    files = [tmp_path / f"my_dog_{name}.safetensors" for name in ("dog", "hat")]
    for place, file in enumerate(files):
        save_file({"clip_l": torch.full((1, 2), float(place))}, file, {})
    find = lambda name: tmp_path / name if (tmp_path / name).is_file() else None  # noqa: E731
    assert files_of_tokens(lora, DECLARED, find) == files
    assert files_of_tokens(lora, {}, find) == []
    assert [e.trigger for e in tokens_of_lora(lora, {}, DECLARED, files, ["<a>", "<b>"])] == ["<a>", "<b>"]
    files[1].unlink()
    assert files_of_tokens(lora, DECLARED, find) == []
    bundled = {"bundle_emb.dog.clip_l": torch.ones(1, 2), "bundle_emb.hat.clip_l": torch.ones(1, 2)}
    assert [e.trigger for e in tokens_of_lora(lora, bundled, DECLARED, ())] == ["<dog>", "<hat>"]


def test_rows_are_fitted_to_the_encoders_of_a_model():
    nameless = LearnedEmbedding("<dog>", {ANY: torch.ones(2, 4)})
    assert nameless.fit({"clip_l": 4}, "x")["clip_l"] is nameless.rows[ANY]
    named = LearnedEmbedding("<dog>", {"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)})
    assert named.fit({"clip_l": 4, "clip_g": 6}, "x") == named.rows
    assert named.fit({"clip_l": 4}, "x").keys() == {"clip_l"}
    for embedding, widths, found, expected in (
        (nameless, {"clip_l": 4, "clip_g": 6}, "one of width 4", "clip_l of width 4 and clip_g of width 6"),
        (named, {"clip_h": 4}, "clip_l of width 4 and clip_g of width 6", "clip_h of width 4"),
        (named, {}, "clip_l of width 4", "no CLIP text encoder"),
    ):
        with pytest.raises(IncompatibleModelError, match="x: token <dog> was trained for other") as refusal:
            embedding.fit(widths, "x")
        assert found in str(refusal.value) and f"this model has {expected}" in str(refusal.value)
