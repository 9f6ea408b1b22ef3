"""Reading learned tokens: whose they are, how rows are divided, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_personalize.models.errors import ConfigError, FormatError
from comfyui_personalize.models.learned_embeddings import (
    declared_tokens,
    parse_triggers,
    read_learned_embeddings,
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
    for damaged in ('[{"rows": 1}]', "[", '["x y"]'):
        with pytest.raises(FormatError, match="personalize.tokens is damaged"):
            declared_tokens({"personalize.tokens": damaged})
    assert declared_tokens({}) == []
    assert declared_tokens({"personalize.tokens": "<a>, <b>"}) == [("<a>", None), ("<b>", None)]


@pytest.mark.parametrize("contents", [{"string_to_param": {}}, {"a.b": torch.ones(2)}, {}])
def test_files_with_nothing_to_learn_from_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="x.pt"):
        read_learned_embeddings(tmp_path / "x.pt")
