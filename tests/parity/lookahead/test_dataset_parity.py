"""The authors' dataset: prompts, groups and candidates as recorded, and other answers exactly where theirs go wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from comfyui_personalize.models.errors import DatasetError
from comfyui_personalize.models.lookahead import REFERENCE_POINTS, widened
from comfyui_personalize.trainers.lookahead.data import (
    REFERENCE_WORD,
    TARGET_WORD,
    FaceSet,
    People,
    filled,
    prompt_of,
)

from ..conftest import GOLDEN


@pytest.fixture
def recorded() -> dict:
    return json.loads((GOLDEN / "lookahead/13_dataset.json").read_text(encoding="utf-8"))


@pytest.fixture
def people(recorded, tmp_path):
    """The recorded files, empty, as a set with these settings."""
    for name in recorded["files"]:
        if name not in recorded["missing_on_disk"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    metadata = tmp_path / "metadata.json"
    metadata.write_text(json.dumps(recorded["files"]))

    def make(**settings) -> People:
        told = {"folder": tmp_path, "metadata": metadata, "prompt_in_filename": True, "placeholder": "face"}
        return People(FaceSet(**told | settings), recorded["instance_prompt"])

    return make


def flags(name: str) -> dict[str, bool]:
    """``use_only_vanilla_for_encoder=True`` in our words."""
    key, value = name.split("=")
    assert key == "use_only_vanilla_for_encoder"
    return {"only_vanilla_references": value == "True"}


def test_prompts_from_file_names(recorded):
    assert recorded["path_to_prompt"]
    for entry in recorded["path_to_prompt"]:
        prompt = prompt_of(entry["stem"], entry["concept_placeholder"])
        assert prompt == entry["prompt"]
        assert filled(prompt, REFERENCE_WORD) == entry["encoder_prompt"]
        assert filled(prompt, TARGET_WORD) == entry["instance_prompt"]


def test_a_name_of_numbers_is_refused_with_a_reason_where_the_authors_crash(recorded):
    assert recorded["path_to_prompt_all_numeric_stem"] == "IndexError"
    with pytest.raises(DatasetError, match="holds no prompt"):
        prompt_of("12_345", "face")


def test_groups(recorded, people):
    for name, expected in recorded["grouping"].items():
        found = people(**flags(name))
        assert [picture.name for picture in found.pictures] == expected["all_paths"]
        assert len(found.pictures) == expected["length"] and found.missing == recorded["missing_on_disk"]
        assert sorted({picture.prompt for picture in found.pictures}) == expected["prompts_set"]


def test_candidates_for_the_encoder(recorded, people):
    mended = Counter()
    for name, expected in recorded["encoder_choice"].items():
        found = people(**flags(name))
        labels = recorded["files"]
        for picture in found.pictures:
            got, theirs = [one.name for one in found.references(picture)], expected[picture.name]
            assert got and all(labels[one] == picture.identity for one in got)
            if theirs["error"]:
                mended["a person without vanilla pictures"] += 1
            elif set(theirs["possible_encoder_images"]) & set(recorded["missing_on_disk"]):
                assert not set(got) & set(recorded["missing_on_disk"])
                mended["a file that is not there"] += 1
            elif sorted(got) != sorted(theirs["possible_encoder_images"]):
                # They take the target itself when there is one vanilla picture, even if that is another one.
                assert theirs["possible_encoder_images"] == [picture.name] and "vanilla" not in picture.name
                assert len(got) == 1 and "vanilla" in got[0]
                mended["a single vanilla picture"] += 1
            if theirs["instance_prompt"] is not None:
                assert picture.prompt == theirs["instance_prompt"]
    assert all(mended.values()) and len(mended) == 3


def test_random_targets_and_the_targets_prompt(recorded, people):
    theirs = recorded["random_target_example"]
    assert theirs["instance_prompt"] == "A photo of {placeholder}"  # which no text encoder knows: ours is filled in
    found, generator = people(placeholder=theirs["concept_placeholder"]), torch.Generator().manual_seed(0)
    pairs = [found.pair(0, 1.0, generator) for _ in range(30)]
    assert len({pair.target.identity for pair in pairs}) > 1
    assert all("{" not in pair.prompt + pair.reference_prompt for pair in pairs)

    expected = recorded["use_only_decoder_prompts_example"]
    found = people(placeholder="{placeholder}", only_target_prompts=True)
    index = [picture.name for picture in found.pictures].index(expected["instance"])
    pair = found.pair(index, 0.0, generator)
    assert (pair.prompt, pair.reference_prompt) == (expected["instance_prompt"], expected["encoder_prompt"])


def test_reference_points_of_head_crops(recorded):
    expected = torch.tensor(recorded["resized_reference_points"], dtype=torch.float64)
    torch.testing.assert_close(widened(REFERENCE_POINTS), expected, rtol=1e-12, atol=0)


def test_without_metadata_a_picture_is_its_own_reference(tmp_path):
    for name in ("b/2.png", "a/3.JPG", "1.txt", "c/1.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = People(FaceSet(folder=Path(tmp_path)), "a photo")
    assert [picture.name for picture in found.pictures] == ["c/1.jpeg", "b/2.png", "a/3.JPG"]
    assert all(found.references(picture) == [picture] for picture in found.pictures)
