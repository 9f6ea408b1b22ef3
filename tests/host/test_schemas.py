"""Saved workflows stay valid: what schemas.json recorded of the nodes never moves, changes its type or goes away.

When this file fails after inputs or nodes were added, or a default was changed on purpose, copy the file that the
message names over tests/host/schemas.json. When it says that something was removed, moved or renamed, undo that:
workflows store widget values by position and links by the names and numbers of sockets.
"""

import json
from pathlib import Path

import pytest

RECORDED = Path(__file__).with_name("schemas.json")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
HOST_LISTS = {
    "concept_name",
    "covariance_name",
    "captions_file",
    "model_folder",
    "clip_folder",
    "clipseg_folder",
    "dino_folder",
    "face_folder",
    "delta_name",
    "sampler_name",
    "scheduler",
    "ckpt_name",
    "vae_name",
    "lora_name",
    "embedding_name",
    "custom_name",
    "custom_name_2",
    "custom_name_3",
    "custom_name_4",
    "encoder_name",
    "clip_vision_name",
    "lcm_lora_name",
    "preview_vae_name",
    "folder",
    "class_folder",
    "people_folder",
    "validation_folder",
    "names_file",
    "vanilla_prompts_file",
    "stylized_prompts_file",
    "face_network",
    "identity_name",
    "image",
}
"""Choices that depend on the host's version or on the files it has."""
SETTINGS = ("default", "min", "max", "step", "multiline", "upload", "control_after_generate")


def described(node) -> dict:
    """The part of a node's schema that saved workflows and translations rely on."""
    schema = node.define_schema()
    inputs = []
    for socket in sorted(schema.inputs, key=lambda entry: entry.optional):  # the host lists required ones first
        entry = {"name": socket.id, "type": socket.get_io_type(), "optional": socket.optional}
        for setting in SETTINGS:
            value = getattr(socket, setting, None)
            if value is not None:
                entry[setting] = getattr(value, "value", value)
        if entry["type"] == "COMBO" and socket.id not in HOST_LISTS:
            entry["options"] = list(socket.options)
        inputs.append(entry)
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "output_node": schema.is_output_node,
        "inputs": inputs,
        "outputs": [{"name": socket.display_name, "type": socket.get_io_type()} for socket in schema.outputs],
    }


def breaks(recorded: dict, current: dict) -> list[str]:
    """What a workflow that was saved with the recorded nodes would trip over."""
    found = []
    for name, old in recorded.items():
        if name not in current:
            found.append(f"{name} is gone")
            continue
        new = current[name]
        old_widgets, new_widgets = (
            [(entry["name"], entry["type"]) for entry in schema["inputs"] if entry["type"] in WIDGETS]
            for schema in (old, new)
        )
        if new_widgets[: len(old_widgets)] != old_widgets:
            found.append(f"{name}: widgets were {old_widgets}, now they are {new_widgets}")
        sockets = {(entry["name"], entry["type"]) for entry in new["inputs"]}
        found += [
            f"{name}.{entry['name']} ({entry['type']}) is gone"
            for entry in old["inputs"]
            if (entry["name"], entry["type"]) not in sockets
        ]
        required = {entry["name"] for entry in old["inputs"]}
        found += [
            f"{name}.{entry['name']} is a new socket that older workflows leave unconnected; make it optional"
            for entry in new["inputs"]
            if entry["name"] not in required and entry["type"] not in WIDGETS and not entry["optional"]
        ]
        if [entry["type"] for entry in new["outputs"]][: len(old["outputs"])] != [e["type"] for e in old["outputs"]]:
            found.append(f"{name}: outputs were {old['outputs']}, now they are {new['outputs']}")
        lost = [
            f"{name}.{one['name']} no longer offers {sorted(set(one['options']) - set(two.get('options', ())))}"
            for one in old["inputs"]
            for two in new["inputs"]
            if one["name"] == two["name"] and set(one.get("options", ())) - set(two.get("options", ()))
        ]
        found += lost
    return found


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def current(host_modules):
    from comfyui_personalize.nodes import NODES

    return {schema.node_id: described(node) for node in NODES if (schema := node.define_schema())}


def test_saved_workflows_stay_valid(recorded, current):
    assert breaks(recorded, current) == []


def test_every_node_is_recorded_as_it_is(recorded, current, tmp_path):
    path = tmp_path / "schemas.json"
    path.write_text(json.dumps(current, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert current == recorded, f"if this change is meant, copy {path} over {RECORDED}"


def test_every_input_and_output_explains_itself(current, host_modules):
    from comfyui_personalize.nodes import NODES

    for node in NODES:
        schema = node.define_schema()
        assert schema.description.endswith(".") and schema.category.startswith("personalize/")
        assert [socket.id for socket in schema.inputs if not (socket.tooltip or "").endswith(".")] == []
        assert [socket.display_name for socket in schema.outputs if not socket.display_name] == []


def test_numbers_have_bounds_around_their_defaults(current):
    for name, schema in current.items():
        for entry in schema["inputs"]:
            if entry["type"] in ("INT", "FLOAT"):
                assert entry["min"] <= entry["default"] <= entry["max"], (name, entry["name"])


def test_a_breaking_change_is_noticed(recorded):
    def changed(edit):
        copy = json.loads(json.dumps(recorded))
        edit(copy)
        return breaks(recorded, copy)

    assert changed(lambda nodes: None) == []
    assert changed(lambda nodes: nodes.pop("PersonalizeStopFixed"))
    assert changed(lambda nodes: nodes["PersonalizeTrainDCO"]["inputs"].pop())
    assert changed(lambda nodes: nodes["PersonalizeTrainDCO"]["inputs"].reverse())
    assert changed(lambda nodes: nodes["PersonalizeTrainDCO"]["outputs"].reverse())
    assert changed(lambda nodes: nodes["PersonalizeTrainDCO"]["inputs"][2].update(name="renamed"))
    assert changed(lambda nodes: nodes["PersonalizeExportLoRA"]["inputs"][1]["options"].pop())
    socket = {"name": "more", "type": "IMAGE", "optional": False}
    assert changed(lambda nodes: nodes["PersonalizeTrainDCO"]["inputs"].append(socket))
    assert not changed(lambda nodes: nodes["PersonalizeTrainDCO"]["inputs"].append({**socket, "optional": True}))
    widget = {"name": "more", "type": "INT", "optional": True}
    assert not changed(lambda nodes: nodes["PersonalizeTrainDCO"]["inputs"].append(widget))
