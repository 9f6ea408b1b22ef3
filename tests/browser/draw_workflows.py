"""Draw workflows/*.json from workflows/api/*.json with the host's own page: `python tests/browser/draw_workflows.py`.

The files in API format are written by hand; what is drawn here is only where their nodes lie.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
WORKFLOWS = TESTS.parent / "workflows"
GAP = 35  # between nodes of a column, and between columns
GROUP_GAP = 60
TITLE = 30  # height of a node's title bar, which lies above its position
GROUP_TITLE = 60  # from the top edge of a group to its nodes

# Width and smallest height, with room for the previews of samplers; 0 is the height that the page gives.
SIZES = {
    "PersonalizeTrainingPicture": (310, 460),
    "PersonalizePersonalizationDataset": (310, 340),
    "PersonalizeLoadTrainingBase": (310, 0),
    "PersonalizeTrainDCO": (440, 1020),
    "PersonalizeLoadDCOLoRA": (340, 0),
    "PersonalizeRewardGuider": (340, 0),
    "PersonalizeKSamplerRewardGuidance": (340, 640),
    "CheckpointLoaderSimple": (340, 0),
    "CLIPTextEncode": (360, 120),
    "RandomNoise": (340, 0),
    "KSamplerSelect": (340, 0),
    "BasicScheduler": (340, 0),
    "EmptyLatentImage": (340, 0),
    "SamplerCustomAdvanced": (420, 340),
    "VAEDecode": (420, 0),
    "SaveImage": (420, 335),
}
COLOURS = {"Personalized prompt": ("#232", "#353"), "Negative prompt": ("#322", "#533")}

NOTE_SIZES = {
    "dco_train_subject": (420, 215),
    "dco_train_style": (420, 215),
    "dco_reward_guidance": (340, 180),
    "dco_subject_in_style": (340, 130),
}
NOTES = {
    "dco_train_subject": """**Teach the model your subject**

1. Drop 3 to 10 pictures on the Training Picture nodes. Copy a node for more, delete one for fewer.
2. Describe each picture completely, background and style too, with `<dog>` where the subject is named. \
Below it, the same in ordinary words.
3. Choose your checkpoint and press Run.

The LoRA goes to *models/loras*, the new word to *models/embeddings*, both as *my_dog*. \
Press R, then open the template *dco_reward_guidance*.""",
    "dco_train_style": """**Teach the model a style**

1. Drop one picture in the style that you like.
2. Describe what it shows, and end with a name for the style, such as \
`in flat cartoon illustration style`. No new word is learned.
3. Choose your checkpoint and press Run.

The LoRA goes to *models/loras* as *my_style*. Press R, then name the style in your prompts in the same words.""",
    "dco_reward_guidance": """**Your subject, anywhere**

1. Choose the checkpoint that you trained on, and your LoRA.
2. Write the prompt twice: with your word `<dog>`, and in ordinary words.
3. *reward_scale* sets how close the picture comes to the subject, *text_scale* how close to the prompt.""",
    "dco_subject_in_style": """**Your subject in your style**

1. Choose the checkpoint, the LoRA of the subject, and after it the LoRA of the style.
2. *reward_scale* is the strength of the subject, *reward_scale_2* that of the style.""",
}

# Groups from left to right; each is a list of columns, each column node ids from top to bottom. NOTE is the note.
NOTE = 0
LAYOUTS: dict[str, list[tuple[str, list[list[int]]]]] = {
    "dco_train_subject": [
        ("Pictures and base model", [[1, 4], [2, 5], [3, 6, 7]]),
        ("Training", [[8]]),
        ("Result", [[10, 9, NOTE]]),
    ],
    "dco_train_style": [
        ("Pictures and base model", [[1, 2, 3]]),
        ("Training", [[4]]),
        ("Result", [[6, 5, NOTE]]),
    ],
    "dco_reward_guidance": [
        ("Model", [[1, 2, NOTE]]),
        ("Prompts", [[3, 4, 5]]),
        ("Sampling", [[6, 7, 8, 9, 10]]),
        ("Result", [[11, 12, 13]]),
    ],
    "dco_subject_in_style": [
        ("Model", [[1, 2, 3, NOTE]]),
        ("Prompts", [[4, 5, 6, 7]]),
        ("Sampling", [[8, 9]]),
        ("Result", [[10, 11]]),
    ],
}

ARRANGE = """({groups, sizes, colours, gaps, note}) => {
    const [gap, groupGap, title, groupTitle] = gaps;
    const pad = 20;
    const noteNode = LiteGraph.createNode("MarkdownNote", "How to use");
    app.graph.add(noteNode);
    noteNode.widgets[0].value = note;
    let x = 0;
    for (const [name, columns] of groups) {
        const left = x;
        let bottom = 0;
        x += pad;
        for (const column of columns) {
            let y = groupTitle + title, width = 0;
            for (const id of column) {
                const node = id ? app.graph.getNodeById(id) : noteNode;
                const [least_width, least_height] = node.computeSize();
                const [wanted_width, wanted_height] = sizes[node.type] ?? [0, 0];
                node.setSize([Math.max(least_width, wanted_width), Math.max(least_height, wanted_height)]);
                node.pos = [x, y];
                if (colours[node.title]) [node.color, node.bgcolor] = colours[node.title];
                y += node.size[1] + title + gap;
                width = Math.max(width, node.size[0]);
            }
            bottom = Math.max(bottom, y - title - gap);
            x += width + gap;
        }
        x += pad - gap;
        const group = new LiteGraph.LGraphGroup(name);
        group.pos = [left, 0];
        group.size = [x - left, bottom + pad];
        app.graph.add(group);
        x += groupGap;
    }
}"""


def draw(frontend, name: str) -> dict:
    """One workflow in the page's format, from its API file and its layout; the page must be new."""
    frontend.load_api(json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")))
    settings = {
        "groups": LAYOUTS[name],
        "sizes": {**SIZES, "MarkdownNote": NOTE_SIZES[name]},
        "colours": COLOURS,
        "gaps": [GAP, GROUP_GAP, TITLE, GROUP_TITLE],
        "note": NOTES[name],
    }
    frontend.page.evaluate(ARRANGE, settings)
    return neutral(json.loads(frontend.page.evaluate("() => JSON.stringify(app.graph.serialize())")))


def neutral(workflow: dict) -> dict:
    """The workflow without what depends on the machine, the moment or the window that it was drawn in."""
    workflow = {key: value for key, value in workflow.items() if key not in ("id", "extra", "revision", "config")}
    for node in workflow["nodes"]:
        pack = "personalize-nodes" if node["type"].startswith("Personalize") else "comfy-core"
        noted = node["type"] == "MarkdownNote"
        node["properties"] = {} if noted else {"cnr_id": pack, "Node name for S&R": node["type"]}
        for slot in node["inputs"] + node["outputs"]:
            slot.pop("localized_name", None)
    return {**workflow, "config": {}, "extra": {}}


def compact(workflow: dict) -> str:
    """JSON with one line per node, link and group, so that a change is a short difference."""
    lines = []
    for key, value in workflow.items():
        if key in ("nodes", "links", "groups"):
            inner = ",\n".join("    " + json.dumps(entry, ensure_ascii=False) for entry in value)
            lines.append(f'  "{key}": [\n{inner}\n  ]')
        else:
            lines.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _helper(path: str):
    name = "personalize_tests_" + re.sub(r"\W", "_", path.removesuffix(".py"))
    spec = importlib.util.spec_from_file_location(name, TESTS / path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def main() -> None:
    """Draw the workflows named on the command line, or all of them."""
    from playwright.sync_api import sync_playwright

    pages, hosts = _helper("browser/conftest.py"), _helper("host/server.py")
    comfyui = _helper("tiny/find_host.py").find_comfyui()
    with tempfile.TemporaryDirectory() as folder, hosts.Server(comfyui, Path(folder)) as server:
        with sync_playwright() as driver:
            executable = next(filter(None, map(pages.shutil.which, pages.CHROMIUM_NAMES)))
            browser = driver.chromium.launch(executable_path=executable, args=list(pages.CHROMIUM_OPTIONS))
            for name in sys.argv[1:] or LAYOUTS:
                # A page that showed another graph before still sizes nodes for its pictures.
                frontend = pages.Frontend(browser.new_page(), server.url)
                frontend.open()
                path = WORKFLOWS / f"{name}.json"
                path.write_text(compact(draw(frontend, name)), encoding="utf-8")
                print(path)
            browser.close()


if __name__ == "__main__":
    main()
