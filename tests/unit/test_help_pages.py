"""The help pages name every input and output of their nodes, as recorded in tests/host/schemas.json, and no other."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = json.loads((ROOT / "tests/host/schemas.json").read_text(encoding="utf-8"))
SECTIONS = ("When to use it", "Inputs", "Outputs", "Tips", "Troubleshooting")


def page(node_id: str) -> str:
    return (ROOT / "web/docs" / f"{node_id}.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(table: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_a_help_page_has_all_its_sections(node_id):
    text = page(node_id)
    assert text.startswith(f"# {NODES[node_id]['display_name']}\n")
    assert [title for title in SECTIONS if f"\n## {title}\n" not in text] == []
    assert len(section(text, "Troubleshooting").splitlines()) >= 4, "at least one thing that can go wrong"


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_a_help_page_explains_every_input_in_the_order_of_the_node(node_id):
    rows = first_column(section(page(node_id), "Inputs"))
    assert rows == [entry["name"] for entry in NODES[node_id]["inputs"]]


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_a_help_page_names_every_output(node_id):
    rows = first_column(section(page(node_id), "Outputs"))
    assert rows == [entry["name"] for entry in NODES[node_id]["outputs"]]


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_tables_are_whole_and_tokens_are_not_taken_for_markup(node_id):
    text = page(node_id)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} <= {3, 4}
    assert "<" not in re.sub(r"`[^`]*`", "", text), "write a token between backticks: the page drops unknown tags"


def test_the_pages_of_the_method_name_its_paper():
    for node_id in ("PersonalizeTrainDCO", "PersonalizeRewardGuider", "PersonalizeLoadDCOLoRA"):
        assert "https://arxiv.org/abs/2402.12004" in section(page(node_id), "Source")
