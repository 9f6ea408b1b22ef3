"""The workflows that ship with the extension, made small enough for a tiny checkpoint."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
TRAININGS = [name for name in NAMES if "_train_" in name]
SAMPLINGS = [name for name in NAMES if name not in TRAININGS]

CHECKPOINT = "tiny_sdxl.safetensors"
SIDE = 64
SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "PersonalizeLoadTrainingBase": {"ckpt_name": CHECKPOINT},
    "PersonalizeTrainDCO": {
        "steps": 2,
        "resolution": SIDE,
        "rank": 2,
        "learning_rate": 1e-2,
        "text_learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "preview_every": 1,
        "preview_steps": 1,
        "overwrite": True,
    },
    "EmptyLatentImage": {"width": SIDE, "height": SIDE},
    "BasicScheduler": {"steps": 2},
    "PersonalizeKSamplerRewardGuidance": {"steps": 2},
}
"""What is changed in the shipped workflows, by node type; everything else stays as shipped."""


def api(name: str) -> dict:
    """A shipped workflow in API format."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def ui(name: str) -> dict:
    """A shipped workflow in the page's format."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def small(name: str) -> dict:
    """A shipped workflow in API format with the settings of SMALL; every one of them must exist in it."""
    graph = api(name)
    for node in graph.values():
        changes = SMALL.get(node["class_type"], {})
        assert changes.keys() <= node["inputs"].keys(), (name, node["class_type"])
        node["inputs"].update(changes)
    return graph


def nodes(graph: dict, kind: str) -> dict[str, dict]:
    """The nodes of one type by name; at least one."""
    found = {name: node for name, node in graph.items() if node["class_type"] == kind}
    assert found, kind
    return found


def upload_pictures(client, graph: dict) -> None:
    """Draw the pictures that a workflow names, and put them into the host's input folder."""
    for index, node in enumerate(nodes(graph, "PersonalizeTrainingPicture").values()):
        picture = Image.new("RGB", (96, 80), (40 * index % 256, 90, 200 - 30 * index))
        ImageDraw.Draw(picture).ellipse((10 + 6 * index, 12, 60 + 6 * index, 62), fill=(230, 120, 40))
        assert client.upload(picture, node["inputs"]["image"]) == node["inputs"]["image"]
