"""Faces found, told apart and cut out, with networks made for drawn faces; nothing asks the network for anything."""

import gc
import socket
import sys
import weakref

import numpy as np
import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, FormatError, MissingDependencyError
from comfyui_personalize.models.face_crops import choose_face, cut_face
from comfyui_personalize.models.faces import Face, FaceAnalyser, face_analyser, release_face_analysers
from comfyui_personalize.models.lookahead import REFERENCE_POINTS, widened


@pytest.fixture(scope="module")
def tiny(load_helper):
    """Drawn faces and the networks that find them; skipped without the packages of the extra "face"."""
    for package in ("onnx", "onnxruntime", "insightface"):
        pytest.importorskip(package, reason=f"{package} cannot be imported", exc_type=ImportError)
    return load_helper("tiny/faces.py")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny.write_face_models(tmp_path_factory.mktemp("faces") / "buffalo_l")


@pytest.fixture(scope="module")
def analyser(folder):
    return FaceAnalyser(folder, "cpu")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"asked the network: {arguments}")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def picture(tiny, width, height, *faces):
    return torch.from_numpy(tiny.draw(width, height, *faces)).permute(2, 0, 1).float() / 127.5 - 1


def face(box, landmarks=None, score=0.9):
    return Face(box, None if landmarks is None else torch.as_tensor(landmarks, dtype=torch.float32), score)


@pytest.mark.parametrize("turn", [0, 20, -20])
@pytest.mark.parametrize("shape", [(160, 160), (320, 240), (120, 200)])
def test_box_and_landmarks_lie_where_the_face_is_drawn(tiny, analyser, shape, turn):
    width, height = shape
    drawn = tiny.Drawn(width * 0.55, height * 0.45, min(shape) * 0.4, turn)
    (faces,) = analyser.detect([picture(tiny, width, height, drawn)])
    (found,) = faces
    pixel = max(shape) / tiny.SIDE  # of the size that the detector sees
    assert found.landmarks.shape == (5, 2) and 0.5 <= found.score <= 1
    assert np.abs(found.landmarks.numpy() - drawn.landmarks).max() < 1.5 * pixel
    if turn == 0:
        assert np.abs(np.subtract(found.box, drawn.box)).max() < 2.5 * pixel


def test_a_batch_keeps_its_order_and_pictures_without_faces(tiny, analyser):
    one = tiny.Drawn(60, 70, 50)
    two = tiny.Drawn(40, 60, 30), tiny.Drawn(110, 70, 60)
    no_face = tiny.Drawn(80, 80, 60, dots=4)
    batch = torch.stack([picture(tiny, 160, 160, *faces) for faces in ((one,), (), two, (no_face,))])
    assert [len(faces) for faces in analyser.detect(batch)] == [1, 0, 2, 0]
    assert analyser.detect(batch[:0]) == []


def test_a_score_that_is_asked_for_is_kept_to(tiny, analyser):
    (faces,) = analyser.detect([picture(tiny, 160, 160, tiny.Drawn(80, 70, 60))])
    assert analyser.detect([picture(tiny, 160, 160, tiny.Drawn(80, 70, 60))], faces[0].score + 0.01) == [[]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (700, 5), (5, 700), (2, 300)])
def test_pictures_too_small_or_too_narrow_for_a_face_have_none(analyser, shape):
    assert analyser.detect([torch.rand(3, *shape) * 2 - 1]) == [[]]


def test_a_detector_for_any_size_sees_small_and_large_faces(tiny, tmp_path):
    analyser = FaceAnalyser(tiny.write_face_models(tmp_path, fixed_size=False, recogniser=False), "cpu")
    small, large = tiny.Drawn(544, 544, 60), tiny.Drawn(240, 240, 300)
    (faces,) = analyser.detect([picture(tiny, 640, 640, small, large)])
    for drawn in (small, large):
        errors = [np.abs(found.landmarks.numpy() - drawn.landmarks).max() for found in faces]
        assert min(errors) < drawn.side / 20, drawn


def test_the_same_face_is_similar_and_another_is_not(tiny, analyser):
    drawn = [tiny.Drawn(80, 70, 60), tiny.Drawn(70, 90, 80, 10), tiny.Drawn(80, 70, 60)]
    images = [picture(tiny, 160, 160, each) for each in drawn]
    images[2] = -images[2]
    faces = [face(each.box, each.landmarks) for each in drawn]
    vectors = analyser.embed(images, faces)
    assert vectors.shape == (3, 512) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.99 and vectors[0] @ vectors[2] < 0
    assert analyser.embed([], []).shape == (0, 512)


def test_recognition_needs_landmarks(analyser):
    with pytest.raises(FormatError, match="gives no landmarks"):
        analyser.embed([torch.zeros(3, 50, 50)], [face((0, 0, 40, 40))])


def test_a_detector_without_landmarks_gives_boxes(tiny, tmp_path):
    tiny.write_detector(tmp_path / "scrfd_10g.onnx", landmarks=False)
    ((found,),) = FaceAnalyser(tmp_path, "cpu").detect([picture(tiny, 160, 160, tiny.Drawn(80, 70, 60))])
    assert found.landmarks is None and np.abs(np.subtract(found.box, (50, 40, 110, 100))).max() < 3
    with pytest.raises(FormatError, match="no landmarks to align by; cut squares"):
        cut_face(torch.zeros(3, 160, 160), found, 64)
    assert cut_face(torch.zeros(3, 160, 160), found, 64, framing="square").shape == (3, 64, 64)


def test_networks_are_kept_until_released_or_changed(tiny, folder, tmp_path):
    release_face_analysers()
    first = face_analyser(folder, "cpu")
    assert face_analyser(folder, "cpu") is first and face_analyser(folder, "auto") is not first
    first.detect([picture(tiny, 160, 160)])
    gone = weakref.ref(first._networks["detection"])
    del first
    release_face_analysers()
    gc.collect()
    assert gone() is None
    tiny.write_face_models(tmp_path, recogniser=False)
    before = face_analyser(tmp_path, "cpu")
    tiny.write_recogniser(tmp_path / "w600k_r50.onnx")
    assert face_analyser(tmp_path, "cpu") is not before
    release_face_analysers()


def test_twenty_runs_take_no_more_memory_than_two(tiny, folder):
    psutil = pytest.importorskip("psutil")
    batch = [picture(tiny, 320, 240, tiny.Drawn(160, 120, 90))] * 4

    def run(times):
        for _ in range(times):
            analyser = face_analyser(folder, "cpu")
            faces = [found[0] for found in analyser.detect(batch)]
            analyser.embed(batch, faces)
        gc.collect()
        return psutil.Process().memory_info().rss

    before = run(2)
    assert run(18) - before < 8e6
    release_face_analysers()


def test_an_empty_folder_says_what_goes_there(tiny, tmp_path):
    with pytest.raises(
        FormatError, match="found no ONNX files, expected a face detector such as det_10g.onnx.*put that"
    ):
        FaceAnalyser(tmp_path).detect([torch.zeros(3, 50, 50)])
    with pytest.raises(FormatError, match="expected a face recognition network such as w600k_r50.onnx"):
        FaceAnalyser(tmp_path).embed([torch.zeros(3, 50, 50)], [face((0, 0, 40, 40), REFERENCE_POINTS * 40)])


def test_a_folder_without_a_detector_names_what_it_holds(tiny, tmp_path):
    tiny.write_face_models(tmp_path, detector=False)
    with pytest.raises(FormatError, match="found w600k_r50.onnx, expected a face detector"):
        FaceAnalyser(tmp_path, "cpu").detect([torch.zeros(3, 50, 50)])


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_network_is_named(tiny, tmp_path, content):
    (tmp_path / "det_10g.onnx").write_bytes(content)
    with pytest.raises(FormatError, match=r"could not use det_10g.onnx \(") as refusal:
        FaceAnalyser(tmp_path, "cpu").detect([torch.zeros(3, 50, 50)])
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_beside_a_sound_one_does_no_harm(tiny, tmp_path):
    (tmp_path / "det_0.onnx").write_bytes(b"nothing")
    tiny.write_recogniser(tmp_path / "det_1.onnx")
    tiny.write_detector(tmp_path / "other.onnx")
    (faces,) = FaceAnalyser(tmp_path, "cpu").detect([picture(tiny, 160, 160, tiny.Drawn(80, 70, 60))])
    assert len(faces) == 1


def test_a_recognition_network_of_another_width_is_refused(tiny, tmp_path):
    tiny.write_recogniser(tmp_path / "w600k_r50.onnx", width=128)
    with pytest.raises(FormatError, match=r"could not use w600k_r50.onnx \(it gives \(1, 128\) for one face"):
        FaceAnalyser(tmp_path, "cpu").embed([torch.zeros(3, 50, 50)], [face((0, 0, 40, 40), REFERENCE_POINTS * 40)])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_is_refused_where_onnxruntime_has_none(tiny, folder):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can compute on CUDA, so there is nothing to refuse")
    with pytest.raises(MissingDependencyError, match="onnxruntime-gpu in its place, or choose auto or cpu"):
        FaceAnalyser(folder, "cuda").detect([torch.zeros(3, 50, 50)])


def test_without_insightface_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(MissingDependencyError, match="package insightface 2.1 or newer, which cannot be imported"):
        FaceAnalyser(tmp_path).detect([torch.zeros(3, 50, 50)])


def test_an_old_insightface_is_named(tiny, monkeypatch, tmp_path):
    import insightface

    monkeypatch.setattr(insightface, "__version__", "0.7.3")
    with pytest.raises(MissingDependencyError, match="found insightface 0.7.3, expected 2.1 or newer"):
        FaceAnalyser(tmp_path).detect([torch.zeros(3, 50, 50)])


FACES = [face((50, 0, 70, 20)), face((0, 0, 10, 10)), face((20, 0, 60, 40))]


@pytest.mark.parametrize(
    ("choice", "index", "expected"),
    [("largest", 1, 2), ("left-most", 1, 1), ("by index", 0, 1), ("by index", 1, 2), ("by index", 2, 0)],
)
def test_a_face_is_chosen(choice, index, expected):
    assert choose_face(FACES, choice, index) is FACES[expected]


def test_there_may_be_no_such_face():
    assert choose_face(FACES, "by index", 3) is None and choose_face(FACES, "by index", -1) is None
    assert all(choose_face([], choice) is None for choice in ("largest", "left-most", "by index"))
    with pytest.raises(ConfigError, match="not as 'nearest'"):
        choose_face(FACES, "nearest")


def brightest_near(image, places, radius=2):
    """The brightest value around each place."""
    corners = [(round(x) - radius, round(y) - radius) for x, y in places.tolist()]
    side = 2 * radius + 1
    return [float(image[:, y : y + side, x : x + side].max()) for x, y in corners]


@pytest.mark.parametrize("margin", [1.0, 1.3, 2.0])
@pytest.mark.parametrize(("scale", "size"), [(1.1, 64), (0.3, 96), (6.0, 96)])
def test_aligned_landmarks_lie_on_the_reference_points(margin, scale, size):
    points = (REFERENCE_POINTS - 0.5) * 60 * scale + torch.tensor([300.0, 260.0])
    image = torch.full((3, 600, 640), -1.0)
    radius = max(1, round(2 * scale))
    for x, y in points.round().long():
        image[:, y - radius : y + radius, x - radius : x + radius] = 1
    cut = cut_face(image, face((0, 0, 1, 1), points), size, margin=margin)
    assert cut.shape == (3, size, size)
    assert min(brightest_near(cut, widened(REFERENCE_POINTS, margin) * size)) > -0.4


def test_a_turned_face_is_turned_upright():
    angle = torch.deg2rad(torch.tensor(35.0, dtype=torch.float64))
    rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    points = (REFERENCE_POINTS - 0.5) @ rotation.T * 120 + 150
    image = torch.full((1, 300, 300), -1.0)
    for x, y in points.round().long():
        image[:, y - 2 : y + 3, x - 2 : x + 3] = 1
    cut = cut_face(image, face((0, 0, 1, 1), points), 120, margin=1.0)
    assert min(brightest_near(cut, REFERENCE_POINTS * 120)) > 0.8


def test_outside_the_picture_aligned_faces_are_grey_and_squares_stay_inside():
    image = torch.ones(3, 100, 100)
    corner = face((0, 0, 30, 30), REFERENCE_POINTS * 30)
    aligned = cut_face(image, corner, 50, margin=2)
    assert aligned[:, 0, 0].abs().max() == 0 and aligned.max() == 1
    torch.testing.assert_close(cut_face(image, corner, 50, framing="square", margin=2), torch.ones(3, 50, 50))


def test_a_square_shows_the_margin_around_the_box():
    image = torch.arange(200.0).expand(1, 100, 200)  # every column has its number
    cut = cut_face(image, face((80, 30, 120, 50)), 60, framing="square", margin=1.5)
    assert cut.shape == (1, 60, 60)
    torch.testing.assert_close(cut[0, 0], torch.arange(70.0, 130.0))  # 40 * 1.5 columns around the middle, 100
    right = cut_face(image, face((180, 30, 220, 50)), 60, framing="square", margin=1.5)
    torch.testing.assert_close(right[0, 0], torch.arange(140.0, 200.0))
    whole = cut_face(image, face((80, 30, 120, 50)), 100, framing="square", margin=5)
    torch.testing.assert_close(whole[0, 0], torch.arange(50.0, 150.0))  # not more than the picture is high


def test_a_large_face_is_shrunk_without_aliasing():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 800, 800, generator=generator)
    points = (REFERENCE_POINTS - 0.5) * 500 + 400
    assert cut_face(noise, face((0, 0, 1, 1), points), 50).std() < 0.15  # ten pixels each way make one


def test_another_framing_is_refused():
    with pytest.raises(ConfigError, match="aligned or square, not 'round'"):
        cut_face(torch.zeros(3, 9, 9), FACES[0], 9, framing="round")
