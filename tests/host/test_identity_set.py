"""The nodes that make a set of people: what the next run makes, what is saved, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

PLANNING = {
    "set_name": "people",
    "names_file": "(none)",
    "names": "Ann Alder\nBo Birk\n\nann alder\n",
    "vanilla_prompts_file": "(none)",
    "vanilla_prompts": "A photo of conceptname",
    "stylized_prompts_file": "(none)",
    "stylized_prompts": "An oil  painting of conceptname",
    "vanilla_pictures": 2,
    "stylized_pictures": 1,
    "first_person": 1,
    "people": 0,
    "count": 4,
    "seed": 0,
}
COLUMNS = ("text", "seed", "identity", "prompt", "vanilla", "left", "set_name")


@pytest.fixture
def inputs(comfy, tmp_path, monkeypatch):
    """The host's input folder, new for each test."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


@pytest.fixture
def plan(inputs):
    """plan(**widgets) -> the outputs by name."""
    from comfyui_personalize.nodes.identity_set import IdentityPrompts

    def execute(**widgets):
        given = PLANNING | widgets
        assert given.keys() == PLANNING.keys()
        return dict(zip(COLUMNS, IdentityPrompts.PREPARE_CLASS_CLONE(None).execute(**given).args, strict=True))

    return execute


@pytest.fixture
def save(inputs):
    """save(images, **lists) -> name, pictures, people."""
    from comfyui_personalize.nodes.identity_set import SaveIdentitySet

    def execute(images, **lists):
        given = {"set_name": ["people"], "identity": ["Ann Alder"], "prompt": ["A photo of conceptname"]}
        given |= {"vanilla": [True], "seed": [0]} | lists
        return SaveIdentitySet.PREPARE_CLASS_CLONE(None).execute(images=images, **given).args

    return execute


def pictures(count, side=8):
    return [torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(index)) for index in range(count)]


def saved(planned, save, **changes):
    lists = {name: planned[name] for name in ("identity", "prompt", "vanilla", "seed")} | changes
    return save(pictures(len(planned["seed"])), **lists)


def listed(inputs, name="people"):
    return json.loads((inputs / name / "metadata.json").read_text(encoding="utf-8"))


def test_run_after_run_fills_the_set_and_then_nothing_is_left(inputs, plan, save):
    from comfy_execution.graph_utils import ExecutionBlocker

    first = plan()
    assert first["identity"] == ["Ann Alder"] * 3 + ["Bo Birk"] and first["left"] == 2  # a name counts once
    assert first["text"][2] == "An oil painting of Ann Alder" and first["vanilla"] == [True, True, False, True]
    assert plan() == first  # nothing was saved: an interrupted run is made again
    assert saved(first, save) == ("people", 4, 2)
    second = plan()
    assert second["identity"] == ["Bo Birk"] * 2 and second["left"] == 0
    assert saved(second, save) == ("people", 6, 2)
    done = plan()
    assert done["left"] == 0 and done["set_name"] == "people"
    assert all(isinstance(done[name][0], ExecutionBlocker) and done[name][0].message is None for name in COLUMNS[:5])

    (inputs / "people" / next(iter(listed(inputs)))).unlink()
    assert plan()["seed"] == first["seed"][:1]
    assert plan(names="Ann Alder\nBo Birk\nCy Cedar", count=9)["identity"] == ["Ann Alder"] + ["Cy Cedar"] * 3


def test_lists_come_from_files_and_may_be_shared_among_machines(inputs, plan):
    (inputs / "mine.txt").write_text("\ufeffDi Dogwood\nEd Elm\n", encoding="utf-8")
    own = plan(names_file="mine.txt", names="Flo Fir", count=99)
    assert sorted(set(own["identity"])) == ["Di Dogwood", "Ed Elm", "Flo Fir"]
    assert set(plan(names_file="mine.txt", names="", first_person=2, people=1, count=99)["identity"]) == {"Ed Elm"}
    shipped = plan(
        names_file="shipped", names="", vanilla_prompts_file="shipped", vanilla_prompts="",
        stylized_prompts_file="shipped", stylized_prompts="", people=1, count=999,
    )  # fmt: skip
    assert len(shipped["text"]) == 80 and len(set(shipped["seed"])) == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": " \n"}, "found no name"),
        ({"first_person": 3}, "there are 2 names"),
        ({"vanilla_pictures": 0, "stylized_pictures": 0}, "would have 0 pictures"),
        ({"vanilla_prompts": "", "stylized_prompts": ""}, "would have 0 pictures"),
        ({"vanilla_pictures": 1_000_000}, "expected 1 to 1000000"),
        ({"names": "../Ann"}, "cannot be part of a file name"),
        ({"vanilla_prompts": "A photo"}, "shows nobody"),
        ({"names_file": "../mine.txt"}, "not a text file in ComfyUI's input folder"),
        ({"set_name": "../people"}, "path separator"),
    ],
)
def test_what_cannot_be_planned_is_refused(inputs, plan, changes, message):
    from comfyui_personalize.models.errors import PersonalizeError

    (inputs.parent / "mine.txt").write_text("Di Dogwood")
    with pytest.raises(PersonalizeError, match=message):
        plan(**changes)
    assert list(inputs.iterdir()) == []


def test_a_list_that_is_no_text_is_refused(inputs, plan):
    from comfyui_personalize.models.errors import DatasetError

    (inputs / "mine.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DatasetError, match="mine.txt cannot be read"):
        plan(names_file="mine.txt")


def test_a_batch_of_one_person_counts_on(inputs, save):
    assert save([torch.cat(pictures(3))], seed=[7]) == ("people", 3, 1)
    names = [f"Ann Alder/vanilla/A_photo_of_conceptname_{seed}.jpg" for seed in (7, 8, 9)]
    assert list(listed(inputs)) == names
    before = [(inputs / "people" / name).read_bytes() for name in names]
    assert save([torch.cat(pictures(4)).flip(0)], seed=[7]) == ("people", 4, 1)  # what is there stays
    assert [(inputs / "people" / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"identity": ["Ann", "Bo"]}, "there are 3 images and 2 of identity"),
        ({"seed": [1, 1, 2]}, "give them seeds of their own"),
        ({"identity": ["../../Ann"]}, "cannot be part of a file name"),
        ({"set_name": ["../people"]}, "path separator"),
        ({"set_name": ["holiday"]}, "found files and no metadata.json"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(inputs, save, lists, message):
    from comfyui_personalize.models.errors import PersonalizeError

    (inputs / "holiday").mkdir()
    (inputs / "holiday" / "beach.jpg").write_bytes(b"picture")
    with pytest.raises(PersonalizeError, match=message) as refusal:
        save(pictures(3), **({"seed": [1, 2, 3]} | lists))
    assert str(inputs) not in str(refusal.value)
    assert sorted(path.name for path in inputs.rglob("*")) == ["beach.jpg", "holiday"]
    assert [path.name for path in inputs.parent.iterdir()] == ["input"]


def test_a_broken_picture_keeps_the_others(inputs, save):
    from comfyui_personalize.models.errors import DatasetError

    broken = [*pictures(1), torch.full((1, 8, 8, 3), torch.nan)]
    with pytest.raises(DatasetError, match="picture 2 contains NaN"):
        save(broken, seed=[1, 2])
    assert len(listed(inputs)) == 1 and len(list((inputs / "people").rglob("*.jpg"))) == 1


def test_a_cancel_keeps_what_is_saved(comfy, inputs, save, monkeypatch):
    from comfyui_personalize.trainers.lookahead.identity_set import IdentitySet

    add = IdentitySet.add

    def add_and_cancel(self, *arguments):
        comfy.model_management.interrupt_current_processing(True)
        return add(self, *arguments)

    monkeypatch.setattr(IdentitySet, "add", add_and_cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(pictures(3), seed=[1, 2, 3])
    assert len(listed(inputs)) == 1
    assert not [path for path in Path(inputs).rglob("*") if path.name.startswith(".")]


def test_names_are_checked_before_anything_runs(inputs):
    from comfyui_personalize.nodes.identity_set import IdentityPrompts, SaveIdentitySet

    assert IdentityPrompts.validate_inputs(set_name="people", names_file="shipped") is True
    assert "path separator" in IdentityPrompts.validate_inputs(set_name="../people")
    assert "no text file named '/etc/passwd'" in IdentityPrompts.validate_inputs(names_file="/etc/passwd")
    assert SaveIdentitySet.validate_inputs(set_name=["people"]) is True
    assert SaveIdentitySet.validate_inputs(set_name=(None,)) is True
    assert "path separator" in SaveIdentitySet.validate_inputs(set_name=["a/b"])
