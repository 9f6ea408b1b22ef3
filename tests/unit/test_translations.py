"""Every translation is complete and holds nothing that the nodes no longer have."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = json.loads((ROOT / "tests/host/schemas.json").read_text(encoding="utf-8"))
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
HOST_LANGUAGES = {"en", "zh", "zh-TW", "fr", "ko", "ru", "es", "ja", "ar", "tr", "pt-BR"}
SYNTAX = re.compile(r"[{}@|]")
"""Characters with a meaning of their own in the page's messages."""


def translated(language: str, file: str) -> dict:
    return json.loads((ROOT / "locales" / language / file).read_text(encoding="utf-8"))


def texts(value) -> list[str]:
    return [value] if isinstance(value, str) else [text for part in value.values() for text in texts(part)]


def test_there_is_a_language_that_the_host_knows():
    assert LANGUAGES and set(LANGUAGES) <= HOST_LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_translated_and_no_other(language):
    found = translated(language, "nodeDefs.json")
    assert list(found) == list(NODES)
    for name, node in NODES.items():
        assert found[name].keys() == {"display_name", "description", "inputs", "outputs"}
        assert list(found[name]["inputs"]) == [entry["name"] for entry in node["inputs"]], name
        assert list(found[name]["outputs"]) == [str(index) for index in range(len(node["outputs"]))], name
        assert all(entry.keys() == {"name", "tooltip"} for entry in found[name]["inputs"].values()), name
        assert all("name" in entry for entry in found[name]["outputs"].values()), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_category_is_translated_and_no_other(language):
    parts = {part for node in NODES.values() for part in node["category"].split("/")}
    assert translated(language, "main.json")["nodeCategories"].keys() == parts


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_there_and_plain(language):
    for file in ("nodeDefs.json", "main.json"):
        for text in texts(translated(language, file)):
            assert text.strip() == text != ""
            assert not SYNTAX.search(text), text
