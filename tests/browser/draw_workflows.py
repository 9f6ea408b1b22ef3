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

import layouts_dco
import layouts_dvar
import layouts_encoder
import layouts_lookahead
import layouts_perfusion

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
    "PersonalizeTrainTextualInversion": (440, 900),
    "PersonalizeTrainDreamBoothLoRA": (440, 1000),
    "PersonalizeTrainCustomDiffusion": (440, 1040),
    "PersonalizeStopDVAR": (440, 0),
    "PersonalizeStopFixed": (440, 0),
    "PersonalizeStopCLIPPlateau": (440, 0),
    "PersonalizeCompareLossCurves": (420, 520),
    "PersonalizeTrainPerfusion": (440, 1100),
    "PersonalizeLoadPerfusionConcept": (340, 0),
    "PersonalizeKSamplerMultiConceptLocking": (360, 720),
    "PersonalizeApplyPerfusion": (340, 0),
    "PersonalizePerfusionTextEncode": (360, 150),
    "PersonalizePerfusionBalance": (400, 900),
    "PersonalizeSoftSubjectMasks": (340, 200),
    "PersonalizeLoadDCOLoRA": (340, 0),
    "PersonalizeRewardGuider": (340, 0),
    "PersonalizeKSamplerRewardGuidance": (340, 640),
    "PersonalizeLoadLookaheadEncoder": (340, 0),
    "PersonalizeEncodeIdentity": (340, 0),
    "PersonalizeSaveIdentity": (340, 0),
    "PersonalizeLoadIdentity": (340, 0),
    "PersonalizeLookaheadGuider": (340, 0),
    "PersonalizeKSamplerLookahead": (360, 960),
    "PersonalizePromptBatch": (360, 180),
    "PersonalizeIdentityPrompts": (400, 760),
    "PersonalizeSaveIdentitySet": (420, 560),
    "PersonalizeTrainLookaheadEncoder": (440, 1500),
    "PersonalizePersonalizationScores": (420, 600),
    "PrimitiveStringMultiline": (360, 160),
    "PersonalizePreviewLossCLIP": (340, 200),
    "PersonalizeLookaheadPreviewGuidance": (340, 0),
    "CheckpointLoaderSimple": (340, 0),
    "CLIPVisionLoader": (340, 0),
    "LoadImage": (340, 380),
    "FreeU": (340, 0),
    "ModelSamplingDiscrete": (340, 0),
    "CLIPTextEncode": (360, 120),
    "ConditioningZeroOut": (360, 0),
    "CFGGuider": (340, 0),
    "RandomNoise": (340, 0),
    "KSamplerSelect": (340, 0),
    "BasicScheduler": (340, 0),
    "KSampler": (340, 560),
    "EmptyLatentImage": (340, 0),
    "SamplerCustomAdvanced": (420, 340),
    "VAEDecode": (420, 0),
    "SaveImage": (420, 335),
    "PreviewAny": (420, 420),
    "PreviewImage": (340, 335),
    "MaskToImage": (340, 0),
    "ImageBatch": (340, 0),
    "LatentBatch": (420, 0),
}
GREEN, RED = ("#232", "#353"), ("#322", "#533")
COLOURS = {
    "Personalized prompt": GREEN,
    "Prompt": GREEN,
    "Prompts, one style a line": GREEN,
    "Prompts, one a line": GREEN,
    "Prompts, one a picture": GREEN,
    "Negative prompt": RED,
    "Negative prompt: none": RED,
}

# Groups from left to right; each is a list of columns, each column node ids from top to bottom. 0 is the note.
METHODS = (layouts_dco, layouts_dvar, layouts_encoder, layouts_lookahead, layouts_perfusion)
LAYOUTS = {name: groups for method in METHODS for name, groups in method.LAYOUTS.items()}
NOTES = {name: note for method in METHODS for name, note in method.NOTES.items()}
NOTE_SIZES = {name: size for method in METHODS for name, size in method.NOTE_SIZES.items()}

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
