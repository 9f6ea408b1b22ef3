"""Sets of generated people: their plan, their files as the training reads them, and how they are gone on with."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from comfyui_personalize.models.errors import ConfigError, DatasetError, FormatError, IncompatibleModelError
from comfyui_personalize.trainers.clip_vision import load_clip_vision
from comfyui_personalize.trainers.lookahead.data import FaceDataSettings, FaceSet
from comfyui_personalize.trainers.lookahead.identity_set import METADATA, SEEDS, IdentitySet, Portrait, portraits

LISTS = Path(__file__).resolve().parents[4] / "workflows" / "identity_set"
VANILLA, STYLIZED = ["A photo of conceptname", "A photo of conceptname, smiling"], ["An oil painting of conceptname"]
PICTURE = Image.new("RGB", (16, 16), (200, 90, 40))


def plan(names=("Ann Alder", "Bo Birk"), **changes):
    settings = {"vanilla_pictures": 2, "stylized_pictures": 1, "seed": 0} | changes
    return list(portraits(names, VANILLA, STYLIZED, **settings))


def fill(folder, planned):
    people = IdentitySet(folder)
    for portrait in planned:
        people.add(portrait, PICTURE)
    people.close()


def test_everybody_is_in_every_prompt_one_person_after_the_other():
    planned = plan()
    assert [one.identity for one in planned] == ["Ann Alder"] * 5 + ["Bo Birk"] * 5
    assert [one.vanilla for one in planned[:5]] == [True] * 4 + [False]
    assert Counter(one.prompt for one in planned) == {VANILLA[0]: 4, VANILLA[1]: 4, STYLIZED[0]: 2}
    assert planned[0].text == "A photo of Ann Alder" and planned[4].text == "An oil painting of Ann Alder"
    assert planned[0].name == f"Ann Alder/vanilla/A_photo_of_conceptname_{planned[0].seed}.jpg"
    assert planned[4].name.startswith("Ann Alder/stylized/An_oil_painting_of_conceptname_")


def test_seeds_follow_from_person_prompt_and_number_alone():
    seeds = [one.seed for one in plan()]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < SEEDS for seed in seeds)
    assert [one.seed for one in plan(["Bo Birk"])] == seeds[5:]
    assert [one for one in plan(vanilla_pictures=1) if one.vanilla] == [plan()[i] for i in (0, 1, 5, 6)]
    assert not set(seeds) & {one.seed for one in plan(seed=1)}


def test_two_that_fill_one_set_list_all_of_it(tmp_path):
    first, second = IdentitySet(tmp_path / "set"), IdentitySet(tmp_path / "set")
    for people, part in ((first, plan()[:5]), (second, plan()[5:])):
        for portrait in part:
            people.add(portrait, PICTURE)
    first.close()
    second.close()
    assert json.loads((tmp_path / "set" / METADATA).read_text()) == {one.name: one.identity for one in plan()}
    assert second.counts == (10, 2)


def test_the_training_reads_people_prompts_and_references(tmp_path):
    fill(tmp_path / "set", plan())
    folder = tmp_path / "set"
    told = {"prompt_in_filename": True, "placeholder": "face", "only_vanilla_references": True}
    (people,) = FaceDataSettings(sets=(FaceSet(folder=folder, metadata=folder / METADATA, **told),)).open().sets
    assert Counter(one.identity for one in people.pictures) == {"Ann Alder": 5, "Bo Birk": 5}
    assert {one.prompt for one in people.pictures} == {
        "A photo of face", "A photo of face, smiling", "An oil painting of face"
    }  # fmt: skip
    painted = next(one for one in people.pictures if "stylized" in one.name)
    assert len(people.references(painted)) == 4
    assert {one.identity for one in people.references(painted)} == {painted.identity}
    assert Image.open(painted.path).size == (16, 16)


@pytest.mark.parametrize(
    ("identity", "prompt", "vanilla", "message"),
    [
        ("../../etc", "A photo of conceptname", True, "cannot be part of a file name"),
        ("/etc", "A photo of conceptname", True, "cannot be part of a file name"),
        ("..", "A photo of conceptname", True, "cannot be part of a file name"),
        ("", "A photo of conceptname", True, "cannot be part of a file name"),
        ("NUL", "A photo of conceptname", True, "cannot be part of a file name"),
        ("Ann", "A photo of conceptname/../..", True, "cannot be part of a file name"),
        ("Ann", "Who is conceptname?", True, "cannot be part of a file name"),
        ("Ann", "A long photo of conceptname " + "and so on " * 20, True, "cannot be part of a file name"),
        ("Ann", "A photo of Ann", True, "write conceptname"),
        ("Ann", "A photo of conceptname in 1920", True, "would read 'A photo of conceptname in'"),
        ("Ann", "A photo_of conceptname", True, "leave out underscores"),
        ("Ann vanilla", "A photo of conceptname", True, "marks plain photographs"),
        ("Ann", "A drawing of conceptname with vanilla ice", False, "marks plain photographs"),
    ],
)
def test_names_and_prompts_that_files_cannot_tell_are_refused(identity, prompt, vanilla, message):
    with pytest.raises(ConfigError, match=message):
        Portrait(identity, prompt, vanilla, 0)


def test_an_interrupted_set_goes_on(tmp_path):
    planned, people = plan(), IdentitySet(tmp_path / "set")
    people.add(planned[0], PICTURE)  # and then the power fails: the picture is there and not listed
    again = IdentitySet(tmp_path / "set")
    assert not again.holds(planned[0])
    before = (tmp_path / "set" / planned[0].name).read_bytes()
    assert not again.add(planned[0], Image.new("RGB", (8, 8)))
    assert (tmp_path / "set" / planned[0].name).read_bytes() == before
    assert again.add(planned[1], PICTURE)
    again.close()

    last = IdentitySet(tmp_path / "set")
    assert [last.holds(one) for one in planned[:3]] == [True, True, False] and last.counts == (2, 1)
    (tmp_path / "set" / planned[1].name).unlink()
    assert not last.holds(planned[1])


def test_a_full_disk_leaves_a_set_that_goes_on(tmp_path, monkeypatch):
    folder, planned = tmp_path / "set", plan()
    fill(folder, planned[:1])
    people = IdentitySet(folder)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FormatError, match="No space left"):
            people.add(planned[1], PICTURE)
        with pytest.raises(FormatError, match="No space left"):
            people.close()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == sorted([planned[0].name, METADATA])
    assert IdentitySet(folder).counts == (1, 1)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        (METADATA, '{"images": ["a.jpg"], "prompts": ["a dog"]}', "expected one JSON table.*choose another name"),
        (METADATA, '[{"file_name": "a.jpg", "text": "a dog"}]', "expected one JSON table.*choose another name"),
        (METADATA, '{"../a.jpg": "Ann"}', "leads out of the folder.*choose another name"),
        (METADATA, '{"": "Ann"}', "names no file.*choose another name"),
        (METADATA, "{", "cannot be read.*choose another name"),
        ("dog.jpg", "", "found files and no metadata.json.*choose another name"),
    ],
)
def test_folders_of_something_else_are_refused_and_left_alone(tmp_path, name, contents, message):
    (tmp_path / name).write_text(contents)
    with pytest.raises(DatasetError, match=message):
        IdentitySet(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == contents


def test_the_shipped_lists_make_a_set():
    names, vanilla, stylized = (
        (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        for name in ("names", "vanilla_prompts", "stylized_prompts")
    )
    assert [len(lines) for lines in (names, vanilla, stylized)] == [100, 20, 40]
    planned = list(portraits(names, vanilla, stylized, vanilla_pictures=2, stylized_pictures=1, seed=0))
    assert len({one.name.casefold() for one in planned}) == 8000


def test_the_metadata_is_the_authors_layout(tmp_path):
    fill(tmp_path / "set", plan(["Zoë Ångström"])[:1])
    listed = json.loads((tmp_path / "set" / METADATA).read_text(encoding="utf-8"))
    assert listed == {plan(["Zoë Ångström"])[0].name: "Zoë Ångström"}
    assert (tmp_path / "set" / next(iter(listed))).is_file()


def test_an_image_encoder_of_an_unusual_size_tells_its_settings_beside_it(tmp_path, load_helper):
    tiny = load_helper("tiny/lookahead.py")
    path = tiny.write_clip_vision(tmp_path / "vision.safetensors")
    with pytest.raises(IncompatibleModelError, match=r"put its config\.json beside it as vision\.json"):
        load_clip_vision(path, torch.float32, "cpu")
    path.with_suffix(".json").write_text(json.dumps(tiny.CLIP_VISION_SIZES))
    assert load_clip_vision(path, torch.float32, "cpu").width == tiny.CLIP_VISION_SIZES["hidden_size"]
