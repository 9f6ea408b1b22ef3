"""Face Crop and Align in the host: what it cuts out, what it says of pictures without a face, and what it refuses."""

import gc
import shutil
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def tiny(load_helper):
    for package in ("onnx", "onnxruntime", "insightface"):
        pytest.importorskip(package, reason=f"{package} cannot be imported", exc_type=ImportError)
    return load_helper("tiny/faces.py")


@pytest.fixture
def models(comfy, tiny):
    """The host's folder for insightface with the pack buffalo_l of the tiny networks in it."""
    from comfyui_personalize.models.faces import release_face_analysers

    root = comfy.base / "models" / "insightface"
    tiny.write_face_models(root / "buffalo_l")
    yield root
    release_face_analysers()
    shutil.rmtree(root)


@pytest.fixture
def node(comfy):
    from comfyui_personalize.nodes.faces import FaceCropAndAlign

    return FaceCropAndAlign


@pytest.fixture
def run(node):
    """run(images, **widgets) -> images, found, count, report."""
    defaults = {entry.id: entry.default for entry in node.define_schema().inputs if entry.id != "images"}

    def execute(images, **widgets):
        return node.PREPARE_CLASS_CLONE(None).execute(images, **defaults | {"size": 96, "device": "cpu"} | widgets).args

    return execute


@pytest.fixture
def draw(tiny):
    """draw(*faces, …) -> a host picture (1, height, width, 3) in 0..1; faces are (x, y, side[, turn])."""

    def picture(*faces, width=160, height=160):
        drawn = tiny.draw(width, height, *(tiny.Drawn(*face) for face in faces))
        return torch.from_numpy(drawn)[None] / 255

    return picture


def colour_places(image, tiny):
    """Where the five dots are in a host picture (height, width, 3), (5, 2)."""
    places = []
    for colour in tiny.DOTS:
        like = (image - torch.tensor(colour) / 255).abs().amax(-1) < 0.3
        places.append(like.nonzero().float().mean(0).flip(0))
    return torch.stack(places)


@pytest.mark.parametrize("turn", [0, 25])
@pytest.mark.parametrize("margin", [1.0, 1.3])
def test_a_turned_face_comes_out_upright(models, run, draw, tiny, turn, margin):
    images, found, count, report = run(draw((80, 75, 60, turn)), size=112, margin=margin)
    assert images.shape == (1, 112, 112, 3) and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    assert (found, count) == (True, 1)
    assert report.startswith("picture 1: 1 face; took the one at (")
    places = colour_places(images[0], tiny)
    eyes, mouth = places[:2], places[3:]
    assert abs(eyes[0, 1] - eyes[1, 1]) < 6 and eyes[0, 0] < eyes[1, 0] and (mouth[:, 1] > eyes[:, 1]).all()
    # The template has the eyes 34 of 112 pixels apart; the drawn face fits it within a fifth.
    assert abs(float(eyes[1, 0] - eyes[0, 0]) * margin - 34) < 7


def test_a_square_is_not_turned(models, run, draw, tiny):
    images, *_ = run(draw((80, 75, 60, 25)), framing="square", size=112)
    left, right = colour_places(images[0], tiny)[:2]
    assert right[1] - left[1] > 8


def test_order_is_kept_and_faceless_pictures_are_kept_whole(models, run, draw):
    wide = torch.cat([draw(), draw((80, 75, 60)), torch.full((1, 160, 160, 3), 0.25)])
    images, found, count, report = run(wide)
    assert images.shape == (3, 96, 96, 3) and (found, count) == (False, 1)
    assert images[0].max() == 0 and images[1].max() > 0.9
    torch.testing.assert_close(images[2], torch.full((96, 96, 3), 0.25), atol=0.5 / 255, rtol=0)
    lines = report.splitlines()
    assert lines[0] == "picture 1: 0 faces; kept whole" and lines[1].startswith("picture 2: 1 face; took")


def test_a_faceless_picture_is_cropped_at_its_centre(models, run):
    middle = torch.zeros(1, 100, 300, 3)
    middle[:, :, 95:205] = 1  # the middle third, and what resampling mixes into its edges
    images, found, *_ = run(middle)
    assert not found and images.shape == (1, 96, 96, 3) and images.min() > 0.99


def test_faceless_pictures_can_be_left_out(models, run, draw):
    batch = torch.cat([draw(), draw((80, 75, 60)), draw()])
    images, found, count, report = run(batch, faceless="leave out")
    assert (len(images), found, count) == (1, False, 1)
    assert report.splitlines()[2] == "picture 3: 0 faces; left out"


def test_a_face_is_chosen_among_several(models, run, draw):
    both = draw((40, 60, 36), (110, 80, 60))
    pictures = {how: run(both, face=how, framing="square", margin=1.0)[0] for how in ("largest", "left-most")}
    assert not torch.equal(pictures["largest"], pictures["left-most"])
    for index, how in enumerate(("left-most", "largest")):
        images, found, count, _ = run(both, face="by index", index=index, framing="square", margin=1.0)
        assert torch.equal(images, pictures[how]) and (found, count) == (True, 2)


def test_an_index_that_a_picture_lacks_is_a_missing_face(models, run, draw):
    images, found, count, report = run(draw((40, 60, 36), (110, 80, 60)), face="by index", index=2)
    assert (len(images), found, count) == (1, False, 2)
    assert report == "picture 1: 2 faces, none with index 2; kept whole"


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures(models, run, draw, channels):
    picture = draw((80, 75, 60))
    if channels == 4:
        images, found, *_ = run(torch.cat([picture, torch.ones(1, 160, 160, 1)], dim=-1))
        assert found and torch.equal(images, run(picture)[0])
    else:
        images, found, *_ = run(picture[..., :1])  # a grey drawing lacks the colours of a face
        assert not found
    assert images.shape == (1, 96, 96, 3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (400, 3)])
def test_tiny_pictures_pass_through(models, run, shape):
    images, found, *_ = run(torch.rand(1, *shape, 3))
    assert images.shape == (1, 96, 96, 3) and not found


def test_twenty_runs_keep_one_detector(models, run, draw):
    from comfyui_personalize.models import faces

    batch = draw((80, 75, 60)).repeat(2, 1, 1, 1)
    for _ in range(20):
        run(batch)
    gc.collect()
    assert sum(type(thing) is faces.FaceAnalyser for thing in gc.get_objects()) == 1
    run(batch, keep_loaded=False)
    gc.collect()
    assert sum(type(thing) is faces.FaceAnalyser for thing in gc.get_objects()) == 0


def test_the_detector_is_given_back_when_the_node_fails(models, run, draw):
    from comfyui_personalize.models import faces
    from comfyui_personalize.models.errors import DatasetError

    with pytest.raises(DatasetError, match="no face to take in any of 2 pictures; lower min_score"):
        run(draw().repeat(2, 1, 1, 1), faceless="leave out", keep_loaded=False)
    assert faces._kept.cache_info().currsize == 0


def test_folders_are_found_wherever_packs_are_unpacked(models, run, node, draw, tiny):
    tiny.write_face_models(models / "models" / "antelopev2", recogniser=False)
    (models / "inswapper_128.onnx").write_bytes(b"large")
    (models / "empty").mkdir()
    (combo,) = [entry for entry in node.define_schema().inputs if entry.id == "model_folder"]
    assert combo.options == ["auto", ".", "buffalo_l", "models/antelopev2"]
    shutil.rmtree(models / "buffalo_l")
    for name in ("auto", "models/antelopev2"):
        assert run(draw((80, 75, 60)), model_folder=name)[1]


def test_new_files_run_the_node_again(models, node, tiny):
    before = node.fingerprint_inputs(model_folder="auto", size=96)
    assert before and node.fingerprint_inputs(model_folder="auto", size=96) == before
    tiny.write_detector(models / "buffalo_l" / "det_500m.onnx")
    assert node.fingerprint_inputs(model_folder="auto", size=96) != before
    assert node.fingerprint_inputs(model_folder="gone") == node.fingerprint_inputs(model_folder=None) == ""


def refused(run, *parts, **widgets):
    from comfyui_personalize.models.errors import PersonalizeError

    images = widgets.pop("images", None)
    with pytest.raises(PersonalizeError) as raised:
        run(torch.zeros(1, 64, 64, 3) if images is None else images, **widgets)
    message = str(raised.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    return message


def test_without_models_one_sentence_says_what_goes_where(run):
    refused(
        run, "no face detector in models/insightface", "det_10g.onnx", "w600k_r50.onnx", "models/insightface/buffalo_l"
    )


def test_without_insightface_one_sentence_says_so(models, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    refused(run, "insightface 2.1 or newer, which cannot be imported", "the Python that runs ComfyUI")


def test_a_wrong_file_is_named_without_its_path(models, run):
    (models / "buffalo_l" / "det_10g.onnx").write_bytes(b"<html>not found</html>")
    message = refused(run, "buffalo_l: found det_10g.onnx, w600k_r50.onnx", "could not use det_10g.onnx (")
    assert str(models) not in message


def test_a_folder_that_is_gone_is_refused(models, run):
    refused(run, "no folder 'antelopev2' with ONNX files", "choose another one", model_folder="antelopev2")


def test_an_empty_batch_is_refused(models, run):
    refused(run, "the batch of images is empty", images=torch.zeros(0, 64, 64, 3))


def test_pictures_that_are_no_numbers_are_refused(models, run):
    refused(run, "picture 2 contains NaN", images=torch.stack([torch.zeros(9, 9, 3), torch.full((9, 9, 3), torch.nan)]))


@pytest.mark.parametrize(
    ("widget", "value"),
    [("model_folder", "gone"), ("framing", "round"), ("face", "best"), ("faceless", "drop"), ("device", "tpu")],
)
def test_unknown_choices_are_refused_before_queueing(models, node, widget, value):
    good = {"model_folder": "auto", "framing": "square", "face": "by index", "faceless": "keep whole", "device": "cpu"}
    assert node.validate_inputs(**good) is True and node.validate_inputs(**good | {widget: None}) is True
    assert repr(value) in node.validate_inputs(**good | {widget: value})
