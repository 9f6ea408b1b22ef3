"""Weights files that are not their card's are refused with the command that makes them again; the card says all."""

import dataclasses
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

FILE = "world_scorer.safetensors"
EVALUATION = {
    "settings": {
        "sampler": "euler", "scheduler": "normal", "steps": 20, "cfg": 3.0, "seed": 9, "captions": 500, "pictures": 500,
    },
    "psnr": 29.31,
    "rows": [{"of": "one shape", "right": "colour", "count": 250, "drawn": 1.0, "ceiling": 0.9912, "sampled": 0.954}],
}  # fmt: skip


@pytest.fixture
def weights(load_helper):
    return load_helper("world/weights.py")


@pytest.fixture
def folder(weights, tmp_path):
    """A folder with a scorer of 8 weights and its card."""
    save_file({"a": np.ones((2, 3), np.float16), "b": np.ones(2, np.float16)}, tmp_path / FILE)
    run = weights.Run.now(seed=1, steps=7, data="3 drawn pictures")
    weights.write_card({FILE: run}, {FILE: {"limit": 3, "drawn": {"shape": 0.9912}}}, {}, tmp_path)
    return tmp_path


def test_the_file_of_the_card_is_given_and_read_once(weights, folder):
    assert weights.path_of(FILE, folder) == folder / FILE
    read = weights._digest.cache_info().misses
    weights.path_of(FILE, folder)
    assert weights._digest.cache_info().misses == read


def test_a_changed_file_is_refused_with_the_command_that_retrains_it(weights, folder):
    path = weights.path_of(FILE, folder)
    expected = weights.read_card(folder)["files"][FILE]["sha256"]
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(weights.WeightsError) as refusal:
        weights.path_of(FILE, folder)
    found = str(refusal.value).split("SHA-256 ")[1].split(",")[0]
    assert len(found) == 64 and found != expected
    assert str(refusal.value) == (
        f"{FILE} has SHA-256 {found}, expected {expected}; restore the committed file, or retrain it with "
        "`python tests/world/train.py --only scorer` and describe it with `python tests/world/train.py --only card`"
    )


def test_what_is_absent_is_said(weights, folder, tmp_path):
    with pytest.raises(weights.WeightsError, match="world_sdxl.safetensors is not in card.json; .* --only sdxl`"):
        weights.path_of("world_sdxl.safetensors", folder)
    with pytest.raises(weights.WeightsError, match="dog.safetensors is no weights file of the small world"):
        weights.path_of("dog.safetensors", folder)
    (folder / FILE).unlink()
    with pytest.raises(weights.WeightsError, match=f"{FILE} is missing .* --only scorer`"):
        weights.path_of(FILE, folder)
    with pytest.raises(weights.WeightsError, match=f"{FILE} is not in card.json; .* --only scorer`"):
        weights.path_of(FILE, tmp_path / "nowhere")


def test_the_card_says_what_the_file_is_the_output_of(weights, folder):
    entry = weights.read_card(folder)["files"][FILE]
    assert (entry["parameters"], entry["bytes"]) == (8, (folder / FILE).stat().st_size)
    assert (entry["seed"], entry["steps"], entry["data"]) == (1, 7, "3 drawn pictures")
    assert len(entry["commit"].removesuffix("-dirty")) == 40
    assert "cores, torch 2." in entry["machine"]
    assert entry["scores"] == {"limit": 3, "drawn": {"shape": 0.9912}}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| limit | 3 |" in text and "| drawn, shape | 0.991 |" in text


def test_people_read_the_same(weights, folder):
    shutil.copy(folder / FILE, folder / "world_sd15.safetensors")
    run = weights.Run.now(seed=1, steps=7, data="3 drawn pictures")
    runs = {"world_sd15.safetensors": dataclasses.replace(run, steps=4000), FILE: run}
    sheet = folder / "samples.jpg"
    weights.write_card(runs, {"world_sd15.safetensors": EVALUATION}, {"world_sd15.safetensors": sheet}, folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| `world_sd15.safetensors` | text to image, laid out like SD1.5 | 0.0 | 0.00 M | 4000 | 1 |" in text
    assert "| one shape | colour | 250 | 95.4 | 99.1 | 100.0 |" in text
    assert "29.3 dB on 500 unseen pictures" in text and "cfg 3)" in text
    assert "](samples.jpg)" in text
    assert run.commit in text and run.machine in text and "Trained on 3 drawn pictures." in text


def test_every_file_needs_a_run(weights, folder):
    (folder / "world_sdxl.safetensors").write_bytes(b"")
    with pytest.raises(weights.WeightsError, match="^world_sdxl.safetensors: every weights file needs a run"):
        weights.write_card({FILE: weights.Run.now(seed=1, steps=1, data="")}, {}, {}, folder)


def test_the_committed_files_are_those_of_the_card(weights):
    card = weights.read_card()
    assert card["files"].keys() == {path.name for path in weights.FOLDER.glob("*.safetensors")}
    assert card["files"].keys() == weights.STAGES.keys()
    sizes = {file: weights.path_of(file).stat().st_size for file in card["files"]}
    assert max(sizes.values()) <= 25e6 and sum(sizes.values()) <= 60e6
    for file, entry in card["files"].items():
        assert entry["bytes"] == sizes[file]
        assert not entry["commit"].endswith("-dirty")
        assert "sheet" not in entry or (weights.FOLDER / entry["sheet"]).stat().st_size <= 200_000
    assert (weights.FOLDER / "README.md").read_text(encoding="utf-8") == weights.readme(card)
