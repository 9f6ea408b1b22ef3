"""CLIP and DINO from local folders: the same numbers as transformers' own classes, and what is refused."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_personalize.models.errors import FormatError
from comfyui_personalize.trainers.network_folders import folder_files, network_in
from comfyui_personalize.trainers.scoring import load_clip_judge, load_dino_judge
from comfyui_personalize.trainers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("tiny/judges.py")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def written(tiny, tokenizer, tmp_path_factory):
    return tiny.write_clip(tmp_path_factory.mktemp("written") / "clip", tokenizer=tokenizer)


@pytest.fixture
def clip(written, tmp_path):
    """A CLIP's folder, to be damaged at will."""
    return shutil.copytree(written, tmp_path / "tiny_clip")


@pytest.fixture
def dino(tiny, tmp_path):
    return tiny.write_dino(tmp_path / "tiny_dino")


def picture(width, height, seed=0):
    """Smooth colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def differs(found, expected):
    """How far apart two normalized pictures are at worst, in steps of 8 bits."""
    return float((found - torch.as_tensor(np.array(expected))).abs().max()) * 0.26 * 255


@pytest.mark.parametrize(("width", "height"), [(32, 32), (200, 90), (61, 150), (20, 25)])
def test_pictures_are_prepared_as_transformers_does(dino, tiny, width, height):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    values = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    tiny.write_preprocessor(dino, **values, image_mean=[0.5] * 3, image_std=[0.26] * 3, resample=3)
    image = picture(width, height)
    expected = CLIPImageProcessorPil.from_pretrained(dino)(image, return_tensors="np").pixel_values[0]
    assert differs(load_dino_judge(dino).preprocessing(image), expected) < 1.5


def test_a_file_of_older_releases_says_the_same(dino, tiny):
    tiny.write_preprocessor(dino, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    new = load_dino_judge(dino).preprocessing
    tiny.write_preprocessor(dino, size=40, crop_size=32, do_center_crop=True)
    assert load_dino_judge(dino).preprocessing == new
    (dino / "preprocessor_config.json").unlink()
    plain = load_dino_judge(dino).preprocessing
    assert (plain.resize, plain.crop, plain.mean) == (32, (32, 32), new.mean)


def test_vision_transformers_see_the_whole_picture(dino, tiny):
    half = [0.5] * 3
    tiny.write_preprocessor(dino, size=32, image_mean=half, image_std=half, resample=2)
    judge = load_dino_judge(dino)
    wide = Image.new("RGB", (96, 32))
    wide.paste((255, 255, 255), (80, 0, 96, 32))
    seen = judge.preprocessing(wide)
    assert seen.shape == (3, 32, 32) and seen[:, :, -1].min() == 1 and seen[:, :, 0].max() == -1


def test_a_line_of_pixels_takes_no_more_memory(dino):
    assert load_dino_judge(dino).preprocessing(Image.new("RGB", (1, 60000))).shape == (3, 32, 32)


def test_clip_embeds_as_transformers_does(clip, tokenizer):
    from transformers import CLIPModel

    judge = load_clip_judge(clip)
    images, words = [picture(32, 32, seed) for seed in range(3)], ["a dog", "a red square on a table, oil painting"]
    pixels = torch.stack([judge.preprocessing(image) for image in images])
    tokens = tokenizer(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip).eval()(pixel_values=pixels, **tokens)
    found = judge.embed_images(images), judge.embed_texts(words)
    for rows, unit in zip(found, (expected.image_embeds, expected.text_embeds)):
        assert rows.dtype == torch.float32 and unit.std(0).max() > 0.01
        torch.testing.assert_close(torch.nn.functional.normalize(rows, dim=1), unit, rtol=1e-5, atol=1e-5)


def test_long_texts_are_read_from_their_start(clip):
    judge = load_clip_judge(clip)
    long, longer = ("dog " * 75, "dog " * 75 + "on a beach")
    assert torch.equal(judge.embed_texts([long]), judge.embed_texts([longer]))


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_dino_gives_its_class_token(tiny, tmp_path, kind):
    from transformers import AutoModel

    judge = load_dino_judge(tiny.write_dino(tmp_path / kind, kind))
    images = [picture(32, 32, seed) for seed in range(3)]
    with torch.no_grad():
        network = AutoModel.from_pretrained(tmp_path / kind).eval()
        states = network(pixel_values=torch.stack([judge.preprocessing(image) for image in images])).last_hidden_state
    rows = judge.embed_images(images)
    assert rows.shape == (3, 32) and rows.std(0).max() > 0.01
    torch.testing.assert_close(rows, states[:, 0])


def test_nothing_is_asked_of_the_network(clip, dino, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_clip_judge(clip).network.training is False
    assert not any(weight.requires_grad for weight in load_dino_judge(dino).network.parameters())


def test_a_folder_tells_what_it_can_judge_by(clip, dino, tiny, tmp_path):
    assert (network_in(clip), network_in(dino), network_in(tmp_path), network_in(tmp_path / "gone")) == (
        "clip",
        "dino",
        None,
        None,
    )
    assert network_in(tiny.write_dino(tmp_path / "dinov2", "dinov2")) == "dino"
    assert {"config.json", "model.safetensors"} <= {path.name for path in folder_files(clip)}
    for text in ('{"model_type": "llama"}', '{"model_type": ["clip"]}', "[]", "{", "[" * 100_000, "\0"):
        (clip / "config.json").write_text(text)
        assert network_in(clip) is None
    (dino / "model.safetensors").unlink()
    assert network_in(dino) is None


def test_the_wrong_kind_is_refused(clip, dino):
    with pytest.raises(FormatError, match="tiny_dino: holds no CLIP with image and text encoder"):
        load_clip_judge(dino)
    with pytest.raises(FormatError, match="tiny_clip: holds no DINO or DINOv2, such as facebook/dino-vits16"):
        load_dino_judge(clip)


def test_missing_weights_are_not_made_up(clip):
    from safetensors.torch import load_file, save_file

    weights = load_file(clip / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "visual_projection" not in k}, clip / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(FormatError, match=r"tiny_clip: lacks weights \(1, such as visual_projection.weight\)"):
        load_clip_judge(clip)


@pytest.mark.parametrize("damage", ["truncated", "text", "other sizes"])
def test_damaged_weights_are_refused_in_one_sentence(dino, damage):
    weights = dino / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "text":
        weights.write_text("<html>not found</html>")
    else:
        config = json.loads((dino / "config.json").read_text())
        (dino / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(FormatError, match="tiny_dino: could not be read .*download its files again") as raised:
        load_dino_judge(dino)
    assert "\n" not in str(raised.value) and str(dino) not in str(raised.value)


@pytest.mark.parametrize(
    "values",
    [
        {"size": {"longest_edge": 32}},
        {"size": "large"},
        {"size": 0},
        {"size": 10**9},
        {"size": 16, "crop_size": 32, "do_center_crop": True},
        {"image_mean": [0.5]},
        {"image_std": [0, 0, 0]},
        {"image_std": None},
        {"resample": 77},
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(dino, tiny, values):
    tiny.write_preprocessor(dino, **values)
    with pytest.raises(FormatError, match="tiny_dino: its preprocessor_config.json does not say how large"):
        load_dino_judge(dino)


def test_pictures_of_another_size_than_the_networks_are_refused(dino, tiny):
    tiny.write_preprocessor(dino, size=64)
    with pytest.raises(FormatError, match="makes pictures of 64 x 64 pixels, but the network takes 32 x 32"):
        load_dino_judge(dino)


def test_a_folder_without_a_tokenizer_takes_another(clip, written):
    for name in ("tokenizer.json", "vocab.json"):
        (clip / name).unlink(missing_ok=True)
    words = ["a dog in the snow"]
    assert torch.equal(load_clip_judge(clip, written).embed_texts(words), load_clip_judge(written).embed_texts(words))
