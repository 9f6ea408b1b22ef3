"""Every method has all its parts: whatever was forgotten is named here."""

import ast
import json
import tomllib
from pathlib import Path

import pytest

from comfyui_personalize.trainers.registry import RECIPES

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted({module.split(".")[0] for module in RECIPES.values()})  # "dco.train" lies in trainers/dco


def node_ids(path: Path) -> set[str]:
    """The literal node_id of each schema in a node file."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    keywords = [keyword for call in calls for keyword in call.keywords if keyword.arg == "node_id"]
    return {keyword.value.value for keyword in keywords if isinstance(keyword.value, ast.Constant)}


ALL_NODES = sorted(set().union(*(node_ids(path) for path in (ROOT / "nodes").glob("*.py"))))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def missing_parts(method: str) -> list[str]:
    """What `method` (the name of its folder) still lacks, as paths or patterns under the root."""
    wanted = [
        f"models/{method}/__init__.py",
        f"trainers/{method}/__init__.py",
        f"trainers/{method}/config.py",
        f"trainers/{method}/train.py",
        f"nodes/{method}.py",
        f"workflows/{method}_*.json",
        f"workflows/api/{method}_*.json",
        f"tests/unit/models/{method}/test_*.py",
        f"tests/unit/trainers/{method}/test_*.py",
        f"tests/parity/{method}/test_*.py",
    ]
    return [pattern for pattern in wanted if not list(ROOT.glob(pattern))]


def test_every_recipe_is_a_module():
    assert RECIPES["dco"] == "dco.train"
    files = [f"trainers/{module.replace('.', '/')}.py" for module in RECIPES.values()]
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_every_method_folder_has_a_recipe():
    folders = {path.parent.name for path in (ROOT / "trainers").glob("*/__init__.py")}
    assert folders == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_all_its_parts(method):
    assert missing_parts(method) == []


def test_a_method_that_is_only_a_name_lacks_everything():
    assert len(missing_parts("unheard_of")) == 10


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_has_an_example_that_opens_with_its_command(recipe):
    folder, module = RECIPES[recipe].split(".")
    name = "example.toml" if module == "train" else f"{module}.example.toml"
    text = (ROOT / "trainers" / folder / name).read_text()
    assert text.startswith("# ") and f" -m comfyui_personalize.trainers {recipe} --config " in text.splitlines()[0]
    assert tomllib.loads(text)


def test_there_are_nodes():
    assert {"PersonalizeTrainDCO", "PersonalizeRewardGuider"} <= set(ALL_NODES)
    assert all(name.startswith("Personalize") for name in ALL_NODES)


@pytest.mark.parametrize("node_id", ALL_NODES)
def test_a_node_has_a_help_page(node_id):
    pages = [ROOT / f"web/docs/{node_id}.md", ROOT / f"web/docs/{node_id}/en.md"]
    text = "".join(page.read_text() for page in pages if page.is_file())
    assert len(text.split()) >= 30, f"write {pages[0].relative_to(ROOT)}: what it does, its inputs, its outputs"


def test_a_help_page_has_its_node():
    pages = {path.stem for path in (ROOT / "web/docs").glob("*.md")}
    assert sorted(pages - set(ALL_NODES)) == []


def test_there_are_workflows():
    assert len(WORKFLOWS) >= 4


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_thumbnail_and_the_same_nodes_in_api_format(path):
    assert path.with_suffix(".jpg").is_file(), "the template browser asks for a thumbnail of the same name"
    drawn = [node["type"] for node in json.loads(path.read_text())["nodes"]]
    queued = [node["class_type"] for node in json.loads((path.parent / "api" / path.name).read_text()).values()]
    assert sorted(kind for kind in drawn if kind not in ("Note", "MarkdownNote")) == sorted(queued)
    ours = {kind for kind in queued if kind.startswith("Personalize")}
    assert ours and ours <= set(ALL_NODES)


def test_every_api_workflow_is_also_drawn():
    assert {path.name for path in (ROOT / "workflows/api").glob("*.json")} == {path.name for path in WORKFLOWS}
