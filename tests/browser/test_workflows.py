"""The shipped workflows in the host's page: they open whole, export what their API files say, and run."""

import itertools
from pathlib import Path

import pytest
from PIL import Image

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "workflows").glob("*.json"))
STAND_INS = (
    ("checkpoints", "sd_xl_base_1.0.safetensors"),
    ("checkpoints", "sd_xl_turbo_1.0_fp16.safetensors"),
    ("checkpoints", "v1-5-pruned-emaonly.safetensors"),
    ("loras", "my_dog.safetensors"),
    ("loras", "my_style.safetensors"),
    ("identities", "my_face.safetensors"),
    ("perfusion_covariances", "C_inv.npy"),
    ("perfusion_concepts", "my_teddy.safetensors"),
    ("perfusion_concepts", "my_cat.safetensors"),
    ("lookahead_encoders", "my_encoder.safetensors"),
    ("arcface", "model_ir_se50.pth"),
    ("insightface/buffalo_l", "det_10g.onnx"),
)
"""Kinds and names of files that are only chosen from lists."""
FILES_TO_CHOOSE = {"ckpt_name", "lora_name", "encoder_name", "clip_name", "identity_name", "image"} | {
    "covariance_name",
    "concept_name",
    "clip_folder",
    "clipseg_folder",
    "clip_vision_name",
    "lcm_lora_name",
    "face_network",
    "face_folder",
    "people_folder",
}
EXTENSION = "comfyui-personalize"
BOXES = """() => app.graph._nodes.map(node => ({
    title: node.title,
    box: [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, ...node.size],
    least: node.computeSize()[1] - (node.imgs?.length ? 220 : 0),  // the page adds 220 where it shows a picture
}))"""
GROUPS = "() => app.graph._groups.map(group => ({title: group.title, box: [...group.pos, ...group.size]}))"
PUT = """changes => { for (const node of app.graph._nodes) for (const widget of node.widgets ?? []) {
    const values = changes[node.type] ?? {};
    if (widget.name in values) widget.value = values[widget.name];
} }"""
PICTURED = """titles => titles.every(title =>
    app.graph._nodes.some(node => node.title === title && node.imgs?.length))"""
THUMBNAIL_SIDE = 480
SHOWN_THUMBNAILS = f"""() => [...document.querySelectorAll("img")].filter(image =>
    image.complete && image.naturalWidth === {THUMBNAIL_SIDE} && image.getBoundingClientRect().width > 0).length"""


@pytest.fixture(scope="module")
def shipped(load_helper):
    return load_helper("host/shipped_workflows.py")


@pytest.fixture(scope="module")
def files(comfy_server, shipped, tiny_checkpoint, load_helper):
    """Put files under the names that the workflows use into the host's folders."""
    models = comfy_server.base / "models"
    for kind, name in STAND_INS:
        path = models / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to(tiny_checkpoint("sdxl"))
    (comfy_server.base / "input" / "my_people").mkdir(parents=True, exist_ok=True)
    shipped.write_models(models, load_helper("tiny/lookahead.py"))
    shipped.write_networks(models, load_helper("tiny/judges.py"))
    with load_helper("host/client.py").Client(comfy_server.url) as client:
        for name in NAMES:
            shipped.upload_pictures(client, shipped.api(name))


def overlap(one, two):
    (x1, y1, width1, height1), (x2, y2, width2, height2) = one["box"], two["box"]
    return x1 < x2 + width2 and x2 < x1 + width1 and y1 < y2 + height2 and y2 < y1 + height1


def inside(one, frame):
    (x, y, width, height), (left, top, frame_width, frame_height) = one["box"], frame["box"]
    return left <= x and top <= y and x + width <= left + frame_width and y + height <= top + frame_height


@pytest.fixture(scope="module")
def one_page(files, open_frontend, comfy_server):
    """A page in which one workflow after another is opened; opening a page anew takes seconds."""
    with open_frontend(comfy_server.url) as frontend:
        yield frontend


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_whole_and_exports_its_api_file(one_page, shipped, tmp_path, name):
    frontend = one_page
    frontend.console_errors.clear()
    frontend.load(shipped.ui(name))
    assert frontend.missing_nodes() == []
    assert frontend.red_widgets() == []
    assert frontend.node_errors() == {"marked": [], "refused": {}}
    assert frontend.export_api() == shipped.api(name)
    assert frontend.console_errors == []
    assert frontend.foreign_requests == []
    picture = Image.open(frontend.screenshot(tmp_path / f"{name}.png")).convert("RGB")
    assert len(picture.getcolors(picture.width * picture.height)) > 100  # something is drawn


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_tidy(one_page, shipped, name):
    one_page.load(shipped.ui(name))
    boxes, groups = one_page.page.evaluate(BOXES), one_page.page.evaluate(GROUPS)
    assert [(a["title"], b["title"]) for a, b in itertools.combinations(boxes, 2) if overlap(a, b)] == []
    assert [(a["title"], b["title"]) for a, b in itertools.combinations(groups, 2) if overlap(a, b)] == []
    assert [box["title"] for box in boxes if not any(inside(box, group) for group in groups)] == []
    assert groups[-1]["title"] == "Result"
    assert len(boxes) == len(shipped.ui(name)["nodes"])
    assert [box["title"] for box in boxes if box["box"][3] + 1 < box["least"]] == [], "too small for their widgets"


def test_missing_files_are_the_only_thing_that_a_new_user_has_to_choose(make_server, open_frontend, shipped, tmp_path):
    with make_server(tmp_path / "fresh") as server, open_frontend(server.url) as frontend:
        for name in NAMES:
            frontend.load(shipped.ui(name))
            assert frontend.missing_nodes() == []
            assert frontend.node_errors()["marked"] == []
            choices = {entry.split(" = ")[0].split(".")[1] for entry in frontend.red_widgets()}
            assert choices <= FILES_TO_CHOOSE


def test_the_template_browser_lists_them_with_their_pictures(frontend, page, client, tmp_path):
    listed = client.http.get(f"{client.url}/workflow_templates", timeout=30).json()
    assert sorted(listed[EXTENSION]) == sorted(NAMES)
    page.set_viewport_size({"width": 1600, "height": 3000})  # pictures further down wait until they are scrolled to
    fetched = set()
    page.on("response", lambda reply: fetched.add(reply.url.split("?")[0].rsplit("/", 1)[-1]) if reply.ok else None)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(EXTENSION, exact=False).last.click()
    page.wait_for_function(f"() => ({SHOWN_THUMBNAILS})() >= {len(NAMES)}", timeout=20_000)
    assert {f"{name}.jpg" for name in NAMES} <= fetched
    text = page.evaluate("() => document.body.innerText")
    assert [name for name in NAMES if name not in text] == []
    frontend.screenshot(tmp_path / "templates.png")
    page.get_by_text("dco_train_subject", exact=True).first.click()
    page.wait_for_function("() => app.graph._nodes.some(node => node.type === 'PersonalizeTrainDCO')", timeout=20_000)
    assert frontend.missing_nodes() == []


@pytest.mark.parametrize(
    ("saving", "saved", "reading", "shown"),
    [
        (
            "dco_train_subject",
            "loras/my_dog.safetensors",
            "dco_reward_guidance",
            [{"Train DCO", "Loss curve", "Preview picture"}, {"Picture"}],
        ),
        (
            "lookahead_face_to_portrait",
            "identities/my_face.safetensors",
            "lookahead_saved_identity",
            [{"Photo of the face", "SamplerCustomAdvanced", "Picture"}, {"KSampler (Lookahead)", "Picture"}],
        ),
    ],
)
def test_what_one_workflow_saves_another_reads(
    files, frontend, shipped, comfy_server, tmp_path, saving, saved, reading, shown
):
    (comfy_server.base / "models" / saved).unlink()  # the stand-in
    for name, titles in zip((saving, reading), shown, strict=True):
        frontend.load(shipped.ui(name))
        frontend.page.evaluate(PUT, shipped.SMALL)
        run = frontend.queue()
        assert run["status"] == "success", run
        assert run["progress"] >= 2
        frontend.page.wait_for_function(PICTURED, arg=sorted(titles), timeout=20_000)
        frontend.screenshot(tmp_path / f"{name}_done.png")
        assert frontend.node_errors() == {"marked": [], "refused": {}}
        assert frontend.console_errors == []


def test_a_set_of_people_grows_with_every_run(files, frontend, shipped, comfy_server, tmp_path):
    frontend.load(shipped.ui("lookahead_generate_identities"))
    frontend.page.evaluate(PUT, shipped.SMALL)
    for pictures in (4, 8):
        run = frontend.queue()
        assert run["status"] == "success", run
        frontend.page.wait_for_function(PICTURED, arg=["Save Identity Set"], timeout=20_000)
        assert len(list((comfy_server.base / "input" / "my_people").rglob("*.jpg"))) == pictures
    frontend.screenshot(tmp_path / "people.png")
    assert frontend.node_errors() == {"marked": [], "refused": {}}
    assert frontend.console_errors == []
