"""The host serves our help pages and translations."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_help_page_is_served(client):
    pages = sorted((ROOT / "web/docs").glob("*.md"))
    assert pages
    for page in pages:
        reply = client.http.get(f"{client.url}/extensions/comfyui-personalize/docs/{page.name}", timeout=30)
        assert reply.ok and reply.content == page.read_bytes(), page.name


def test_the_translations_are_served(client):
    served = client.http.get(f"{client.url}/i18n", timeout=30).json()
    for folder in (ROOT / "locales").iterdir():
        nodes = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert nodes.items() <= served[folder.name]["nodeDefs"].items()
        categories = json.loads((folder / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
        assert categories.items() <= served[folder.name]["nodeCategories"].items()
