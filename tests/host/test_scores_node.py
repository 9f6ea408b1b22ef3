"""Personalization Scores in the host: what it measures by which network, what it leaves out, and what it refuses."""

import gc
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "world"))

DINO, FACES = "tiny_dino", "buffalo_l"
FAITHFUL = "clip_world"


@pytest.fixture(scope="module", autouse=True)
def quick_collections(host_modules):
    """What is there before counts as kept for good: each run collects garbage, and the host is large."""
    import transformers.models.clip.modeling_clip  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("tiny/judges.py")


@pytest.fixture(scope="module")
def scoring(host_modules, tiny):
    """The host's folder for scoring with a DINO with random weights and the small world's CLIP, which is trained."""
    import clip_pair
    from weights import path_of

    root = host_modules.base / "models" / "scoring"
    tiny.write_dino(root / "nested" / DINO)
    with torch.inference_mode(False):
        clip_pair.load_pair(path_of(clip_pair.FILE))[0].save_pretrained(root / FAITHFUL)
    (root / "no_network").mkdir()
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def faces(load_helper, host_modules):
    """Drawn faces and networks that know them; skipped where insightface is not installed."""
    for package in ("onnx", "onnxruntime", "insightface"):
        pytest.importorskip(package, reason=f"{package} cannot be imported", exc_type=ImportError)
    helper = load_helper("tiny/faces.py")
    root = host_modules.base / "models" / "insightface"
    helper.write_face_models(root / FACES)
    yield helper
    shutil.rmtree(root)


@pytest.fixture
def node(comfy, scoring):
    from comfyui_personalize.nodes.scores import PersonalizationScores

    return PersonalizationScores


@pytest.fixture
def run(node):
    """run(images, references, prompts, **inputs) -> clip_i, clip_t, dino, face, table, plot; all as lists, as given."""

    def execute(images, references, prompts="", **inputs):
        given = {"clip_folder": "none", "dino_folder": "none", "face_folder": "none"} | inputs
        listed = {name: [value] for name, value in given.items()}
        images, references, prompts = (
            value if isinstance(value, list) else [value] for value in (images, references, prompts)
        )
        clone = node.PREPARE_CLASS_CLONE(None)
        return clone.execute(images=images, references=references, prompts=prompts, **listed).args

    return execute


@pytest.fixture(scope="module")
def scenes():
    """Four drawn scenes, (4, 64, 64, 3), and their captions."""
    from captions import caption
    from dataset import draw_bytes, in_unit_range
    from generator import random_scene

    drawn = [random_scene(random.Random(f"scores/{number}")) for number in range(4)]
    pictures = in_unit_range(torch.stack([draw_bytes(scene) for scene in drawn])).movedim(1, -1).contiguous()
    return pictures, [caption(scene) for scene in drawn]


def cells(table, row):
    """The numbers of a table's row by the name of their column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (found,) = [line for line in lines if line[0] == str(row)]
    return dict(zip(lines[0][1:], found[1:]))


def test_the_same_picture_scores_one_and_the_right_caption_more_than_a_wrong_one(run, scenes):
    pictures, captions = scenes
    clip_i, right, dino, face, table, plot = run(pictures[:1], pictures[:1], captions[0], clip_folder=FAITHFUL)
    assert clip_i == pytest.approx(1, abs=1e-5) and (dino, face) == (0.0, 0.0)
    assert cells(table, 1) == {"CLIP-I": "1.0000", "CLIP-T": f"{right:.4f}", "DINO": "–", "face": "–"}
    assert "- DINO: choose a dino_folder" in table and cells(table, "mean")["face"] == "not measured"
    assert plot.shape == (1, 432, 768, 3) and plot.dtype == torch.float32
    for caption in captions[1:]:
        assert run(pictures[:1], pictures[:1], caption, clip_folder=FAITHFUL)[1] < right - 0.1


def test_each_image_meets_its_own_prompt(run, scenes):
    pictures, captions = scenes
    rows = {}
    for name, prompts in {"lines": "\n\n".join(captions), "list": captions, "turned": captions[::-1]}.items():
        *_, table, _ = run(pictures, pictures, prompts, clip_folder=FAITHFUL)
        rows[name] = [float(cells(table, row)["CLIP-T"]) for row in range(1, 5)]
    assert rows["lines"] == rows["list"]
    assert all(right > wrong for right, wrong in zip(rows["list"], rows["turned"]))


def test_the_host_and_the_folder_agree_on_the_same_network(comfy, run, scenes):
    import clip_pair
    from weights import path_of

    folder = Path(comfy.folder_paths.get_folder_paths("clip_vision")[0])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path_of(clip_pair.FILE), folder / "scores_world.safetensors")
    (clip_vision,) = comfy.nodes.CLIPVisionLoader().load_clip("scores_world.safetensors")
    pictures, _ = scenes
    by_host = run(pictures[:3], pictures[2:], clip_vision=clip_vision)
    by_folder = run(pictures[:3], pictures[2:], clip_folder=FAITHFUL)
    assert by_host[0] == pytest.approx(by_folder[0], abs=2e-3)
    assert by_host[1] == 0 and "- CLIP-T: there are no prompts" in by_host[4]
    assert "- CLIP-T: connect clip" in run(pictures, pictures, "a dog", clip_vision=clip_vision)[4]


@pytest.fixture
def vision(comfy, tmp_path):
    """vision(dim) -> an image encoder of the host with random weights and a projection to dim, or None for none."""
    import json

    import comfy.clip_vision

    def make(dim):
        sizes = json.loads((Path(__file__).parents[1] / "tiny" / "clip_vision.json").read_text())
        del sizes["projection_dim"]
        (tmp_path / "sizes.json").write_text(json.dumps(sizes if dim is None else sizes | {"projection_dim": dim}))
        model = comfy.clip_vision.ClipVisionModel(tmp_path / "sizes.json")
        generator = torch.Generator().manual_seed(0)
        for weight in model.model.parameters():
            scale = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        return model

    return make


def test_prompts_by_the_hosts_own_clip(comfy, run, scenes, vision):
    pictures, _ = scenes
    clip, clip_vision = comfy.load("sdxl")[1], vision(128)  # as wide as the tiny model's larger encoder
    clip_i, clip_t, *_ = run(pictures, pictures, "a dog\na cat\na tree\na house", clip_vision=clip_vision, clip=clip)
    prompts = ("a dog", "a cat", "a tree", "a house")
    words = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1] for prompt in prompts]
    seen = torch.nn.functional.normalize(clip_vision.encode_image(pictures)["image_embeds"], dim=1)
    assert clip_t == pytest.approx(torch.cosine_similarity(seen, torch.cat(words)).mean().item(), abs=1e-5)
    assert clip_i == pytest.approx((seen @ seen.T).mean().item(), abs=1e-5)


def test_dino_is_the_mean_over_all_pairs_of_pictures_of_any_sizes(run, node, scoring, scenes):
    from comfyui_personalize.trainers.scoring import load_dino_judge

    pictures, _ = scenes
    wide = torch.nn.functional.interpolate(pictures[:1].movedim(-1, 1), (90, 200)).movedim(1, -1)
    *_, dino, face, table, _ = run([pictures, wide], [pictures[1:3], wide], dino_folder=f"nested/{DINO}")
    judge = load_dino_judge(scoring / "nested" / DINO)
    from PIL import Image

    shown = [Image.fromarray((one * 255).round().byte().numpy()) for one in [*pictures, wide[0]]]
    rows = torch.nn.functional.normalize(judge.embed_images(shown), dim=1)
    pairs = rows @ rows[[1, 2, 4]].T
    assert dino == pytest.approx(pairs.mean().item(), abs=1e-5) and pairs.std() > 0.01
    assert cells(table, 5)["DINO"] == f"{pairs[4].mean():.4f}"


@pytest.fixture
def draw(faces):
    """draw(*faces) -> a host picture (1, 160, 160, 3); faces are (x, y, side[, turn])."""

    def picture(*drawn):
        return torch.from_numpy(faces.draw(160, 160, *(faces.Drawn(*one) for one in drawn)))[None] / 255

    return picture


def test_faces_are_compared_and_faceless_pictures_left_out(run, draw):
    face, turned = (80, 75, 60), (70, 85, 56, 20)
    made = torch.cat([draw(), draw(face), draw((30, 30, 20), turned)])
    *_, value, table, _ = run(made, torch.cat([draw(face), draw()]), face_folder=FACES)
    assert [cells(table, row)["face"] for row in (1, 2)] == ["–", "1.0000"]
    third = float(cells(table, 3)["face"])
    assert 0 < third < 1 and value == pytest.approx((1 + third) / 2, abs=1e-4)
    assert "- face: no face in 1 of 3 images and 1 of 2 references, left out" in table


def test_without_any_face_nothing_is_measured_and_the_rest_stands(run, draw, scenes):
    pictures = scenes[0]
    *_, dino, face, table, _ = run(pictures[:2], pictures, face_folder=FACES, dino_folder=f"nested/{DINO}")
    assert dino > 0 and face == 0.0
    assert "- face: no face in 2 of 2 images and 4 of 4 references" in table
    assert cells(table, "mean")["face"] == "not measured"


def test_grey_and_transparent_pictures(run, scenes):
    pictures = scenes[0]
    opaque = torch.cat([pictures, torch.ones(4, 64, 64, 1)], dim=-1)
    assert run(opaque, pictures, clip_folder=FAITHFUL)[:4] == run(pictures, pictures, clip_folder=FAITHFUL)[:4]
    assert run(pictures[..., :1], pictures[..., :1], dino_folder=f"nested/{DINO}")[2] > 0


def test_a_batch_larger_than_a_network_sees_at_once(run, scenes):
    pictures = scenes[0]
    many = run(pictures.repeat(9, 1, 1, 1), pictures, clip_folder=FAITHFUL)
    few = run(pictures, pictures, clip_folder=FAITHFUL)
    assert many[0] == pytest.approx(few[0], abs=1e-5) and cells(many[4], 36) == cells(few[4], 4)


def test_lines_of_pixels_pass_through(run, vision):
    lines = torch.rand(1, 1, 4000, 3)
    assert run(lines, lines, dino_folder=f"nested/{DINO}", clip_vision=vision(24))[0] == pytest.approx(1, abs=1e-5)


def test_twenty_runs_leave_nothing_behind(run, scenes):
    one = scenes[0][:1]

    def networks():
        gc.collect()
        return sum(issubclass(type(thing), torch.nn.Module) for thing in gc.get_objects())

    before = networks()
    for _ in range(20):
        run(one, one, clip_folder=FAITHFUL, dino_folder=f"nested/{DINO}")
    assert networks() == before


def test_runs_with_words_and_faces_leave_nothing_behind(run, draw):
    from transformers import PreTrainedTokenizerBase

    from comfyui_personalize.models.faces import FaceAnalyser

    def left():
        gc.collect()
        kinds = (torch.nn.Module, FaceAnalyser, PreTrainedTokenizerBase)
        return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())

    before = left()
    for _ in range(3):
        run(draw((80, 75, 60)), draw((80, 75, 60)), "a face", clip_folder=FAITHFUL, face_folder=FACES)
    assert left() == before


def test_a_cancel_ends_it_and_leaves_nothing_behind(comfy, run, scenes):
    pictures = scenes[0]
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(pictures, pictures, dino_folder=f"nested/{DINO}")
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "ViTModel"]


def test_only_fitting_folders_are_listed(node, run):
    options = {entry.id: entry.options for entry in node.define_schema().inputs if hasattr(entry, "options")}
    assert options["clip_folder"] == ["none", FAITHFUL] and options["dino_folder"] == ["none", f"nested/{DINO}"]


def test_new_files_run_the_node_again(node, scoring):
    chosen = {"dino_folder": [f"nested/{DINO}"], "clip_folder": ["none"], "face_folder": ["none"]}
    before = node.fingerprint_inputs(**chosen)
    assert before and node.fingerprint_inputs(**chosen) == before
    weights = scoring / "nested" / DINO / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)
    assert node.fingerprint_inputs(**chosen) != before
    assert node.fingerprint_inputs() == node.fingerprint_inputs(clip_folder=["gone"]) == ""


def refused(run, *parts, images=None, references=None, prompts="", **inputs):
    from comfyui_personalize.models.errors import PersonalizeError

    grey = torch.full((2, 64, 64, 3), 0.5)
    with pytest.raises(PersonalizeError) as raised:
        run(grey if images is None else images, grey if references is None else references, prompts, **inputs)
    message = str(raised.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message and str(Path.cwd()) not in message
    return message


def test_nothing_to_measure_with(run):
    refused(run, "nothing to measure with", "choose a clip_folder, a dino_folder or a face_folder")


def test_clip_from_two_places(run):
    refused(run, "CLIP is there twice: the clip_folder clip_world", clip_folder=FAITHFUL, clip_vision=object())


def test_words_without_eyes(run):
    refused(run, "clip is connected without clip_vision", clip=object(), dino_folder=f"nested/{DINO}")


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_prompts(run, count):
    prompts = "\n".join("a dog" for _ in range(count))
    refused(run, f"found {count} prompts for 2 images; write one line", prompts=prompts, dino_folder=f"nested/{DINO}")


@pytest.mark.parametrize("which", ["images", "references"])
def test_no_pictures(run, which):
    empty = torch.zeros(0, 64, 64, 3)
    refused(run, "there are no pictures to compare", dino_folder=f"nested/{DINO}", **{which: empty})


def test_pictures_that_are_no_numbers(run):
    broken = torch.full((1, 9, 9, 3), torch.nan)
    refused(run, "reference 1 contains NaN", references=broken, dino_folder=f"nested/{DINO}")


def test_towers_that_were_not_trained_together(comfy, run, vision):
    clip = comfy.load("sdxl")[1]
    parts = "words by 128 numbers and this CLIP Vision pictures by 64", "CLIP-ViT-bigG"
    refused(run, *parts, prompts="a dog", clip=clip, clip_vision=vision(64))


def test_text_encoders_without_a_projection(comfy, run, vision):
    clip = comfy.load("sd15")[1]
    refused(run, "saved without its projection", "clip_folder", prompts="a dog", clip=clip, clip_vision=vision(64))


def test_an_image_encoder_that_is_no_clip(run, vision):
    refused(run, "no projection into the space of pictures and words", clip_vision=vision(None))


def test_embeddings_that_are_no_numbers(run, vision):
    broken = vision(64)
    broken.model.visual_projection.weight.fill_(torch.nan)
    refused(run, "CLIP-I: the network answers with values that are no numbers", clip_vision=broken)


def test_damaged_files_are_named_without_their_path(run, scoring, tiny):
    folder = tiny.write_dino(scoring / "damaged")
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    message = refused(run, "damaged: could not be read (", dino_folder="damaged")
    assert str(scoring) not in message
    shutil.rmtree(folder)
    refused(run, "there is no folder 'damaged'", "choose another one", dino_folder="damaged")


@pytest.mark.parametrize("widget", ["clip_folder", "dino_folder", "face_folder"])
def test_unknown_choices_are_refused_before_queueing(node, widget):
    good = {"clip_folder": [FAITHFUL], "dino_folder": [f"nested/{DINO}"], "face_folder": ["none"]}
    assert node.validate_inputs(**good) is True
    assert node.validate_inputs(**good | {widget: [None]}) is True
    assert "'gone'" in node.validate_inputs(**good | {widget: ["gone"]})
