"""Datasets from folders, JSON files and memory; contradictions are refused when the dataset is made."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from comfyui_personalize.models.errors import ConfigError, DatasetError
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.dataset import Dataset, check_tokens_are_new

DOG = LearnedToken("<dog>", "dog")


def draw(folder, *names, size=(12, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.new("RGB", size, (20 * index + 10, 100, 200)).save(folder / name)
    return folder


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def names(dataset):
    return [example.picture.name for example in dataset.examples]


def captions(dataset):
    return [example.caption for example in dataset.examples]


def bases(dataset):
    return [example.base_caption for example in dataset.examples]


def image(value=0.5, size=(8, 12)):
    return torch.full((*size, 3), value)


def test_one_caption_serves_every_picture_in_natural_order(tmp_path):
    draw(tmp_path, "10.png", "2.JPG", "1.webp", ".hidden.png")
    (tmp_path / "notes.md").write_text("no picture")
    dataset = Dataset.from_folder(tmp_path, captions="a <dog> runs", tokens=[DOG])
    assert names(dataset) == ["1.webp", "2.JPG", "10.png"]
    assert captions(dataset) == ["a <dog> runs"] * 3
    assert bases(dataset) == ["a dog runs"] * 3


def test_captions_are_read_beside_the_pictures(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    write(tmp_path, a="a <dog>\non grass\n", b="a <dog> asleep")
    (tmp_path / "b.base.txt").write_text("\ufeffa brown dog asleep", encoding="utf-8")
    dataset = Dataset.from_folder(tmp_path, tokens=[DOG])
    assert captions(dataset) == ["a <dog> on grass", "a <dog> asleep"]
    assert bases(dataset) == ["a dog on grass", "a brown dog asleep"]


def test_style_without_tokens_keeps_its_captions(tmp_path):
    draw(tmp_path, "a.png")
    dataset = Dataset.from_folder(tmp_path, captions="a laptop in flat cartoon style")
    assert bases(dataset) == captions(dataset)
    assert dataset.tokens == ()


def test_several_tokens_become_their_initializers():
    tokens = [DOG, LearnedToken("<dog2>", "cat"), LearnedToken("<hat>", "red hat", rows=2)]
    dataset = Dataset.from_tensors(image()[None], "<DOG> beside <dog2> with a <hat>", tokens=tokens)
    assert bases(dataset) == ["dog beside cat with a red hat"]


def test_masks_lie_in_their_folder_under_the_picture_name(tmp_path):
    draw(tmp_path, "a.jpg", "b.jpg")
    draw(tmp_path / "mask", "b.png", size=(24, 16))
    dataset = Dataset.from_folder(tmp_path, captions="a dog")
    assert dataset.examples[0].mask is None
    assert dataset.examples[0].load(8).mask is None
    assert dataset.examples[1].load(8).mask.shape == (1, 8, 8)
    elsewhere = draw(tmp_path / "other", "a.png")
    assert Dataset.from_folder(tmp_path, captions="a dog", masks=elsewhere).examples[0].mask.name == "a.png"


def test_transparency_is_the_mask_unless_one_is_given():
    transparent = torch.ones(8, 8, 4)
    transparent[:, :4, 3] = 0
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    own = Dataset.from_tensors([transparent], "a dog").examples[0].load(8).mask
    given = Dataset.from_tensors([transparent], "a dog", masks=[mask]).examples[0].load(8).mask
    assert torch.equal(own[0], transparent[..., 3])
    assert torch.equal(given[0], mask)


def layout(images, **more):
    return {"images": images, "prompts": ["a <dog> on grass"], **more}


def write_config(folder, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sections))
    return folder / "config.json"


def test_the_authors_file_is_used_by_itself_and_found_wherever_it_lies(tmp_path):
    draw(tmp_path, "00.png", "01.png", "unlisted.png")
    listed = ["dataset/dreambooth/dog/01.png", "00.png"]
    full = layout(listed, base_prompts=["a dog on grass"], inserting_tokens=["<dog>"], initializer_tokens=["puppy"])
    write_config(tmp_path, dreambooth={"images": listed, "prompts": ["a sks dog"]}, full_ti=full)
    dataset = Dataset.from_folder(tmp_path)
    assert names(dataset) == ["01.png", "00.png"]
    assert dataset.tokens == (LearnedToken("<dog>", "puppy"),)
    assert bases(dataset) == ["a dog on grass"] * 2
    assert captions(Dataset.from_folder(tmp_path, section="dreambooth")) == ["a sks dog"] * 2
    own = Dataset.from_folder(tmp_path, tokens=[LearnedToken("<dog>", "dog", rows=2)])
    assert own.tokens[0].rows == 2
    assert names(Dataset.from_folder(tmp_path, captions="a dog")) == ["00.png", "01.png", "unlisted.png"]


def test_json_paths_masks_and_class_pictures(tmp_path):
    draw(tmp_path / "pictures", "0.png", "1.png")
    draw(tmp_path / "masks", "a.png", "b.png")
    draw(tmp_path / "class", "0.png", "1.png", "2.png")
    section = layout(
        ["pictures/0.png", str(tmp_path / "pictures" / "1.png")],
        masks=["masks/b.png", "masks/a.png"],
        class_images_dir="some/where/class",
        class_prompts=["a photo of a dog"],
    )
    (tmp_path / "mine.json").write_text(json.dumps(section))
    dataset = Dataset.from_json(tmp_path / "mine.json", tokens=[DOG])
    assert [example.mask.name for example in dataset.examples] == ["b.png", "a.png"]
    assert [example.caption for example in dataset.class_examples] == ["a photo of a dog"] * 3
    assert [example.base_caption for example in dataset.class_examples] == ["a photo of a dog"] * 3


def test_another_tools_config_is_passed_over(tmp_path):
    draw(tmp_path, "a.png")
    write(tmp_path, a="a dog")
    write_config(tmp_path, resolution=512)
    assert captions(Dataset.from_folder(tmp_path)) == ["a dog"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ("{}", "no section with 'images'"),
        ({"a": layout(["0.png"]), "b": layout(["0.png"])}, "expected one section with images, found: a, b"),
        (layout([]), "no pictures"),
        (layout("0.png"), "'images' is str"),
        (layout([0]), "'images' is list; write a list of texts"),
        ({"images": ["0.png"]}, "'prompts' is missing"),
        (layout(["9.png"]), "found neither '9.png'"),
        (layout(["../gone/"]), "found neither '../gone/'"),
        (layout(["0.png"], inserting_tokens=["<dog>"], initializer_tokens=[]), "1 inserting_tokens and 0"),
        (layout(["0.png"], inserting_tokens=["<dog>"]), "no initializer"),
        (layout(["0.png"], class_images_dir=3), "'class_images_dir' is 3"),
        (layout(["0.png"], class_images_dir="nowhere"), "found neither 'nowhere'"),
        (layout(["0.png", "0.png", "0.png"], base_prompts=["a", "b"]), "found 2 base captions for 3 pictures"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, reason):
    draw(tmp_path, "0.png")
    path = tmp_path / "dog.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DatasetError) as refused:
        Dataset.from_json(path)
    assert reason in str(refused.value)


def test_missing_json_and_section_are_refused(tmp_path):
    draw(tmp_path, "0.png")
    with pytest.raises(DatasetError, match="no such file"):
        Dataset.from_folder(tmp_path, section="full_ti")
    write_config(tmp_path, a=layout(["0.png"]))
    with pytest.raises(DatasetError, match="no section 'b' with images; choose one of: a"):
        Dataset.from_folder(tmp_path, section="b")


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="found no pictures"):
        Dataset.from_folder(tmp_path, captions="a dog")
    with pytest.raises(DatasetError, match="found nothing, expected a folder"):
        Dataset.from_folder(tmp_path / "absent", captions="a dog")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="found a file, expected a folder"):
        Dataset.from_folder(tmp_path / "file", captions="a dog")
    with pytest.raises(DatasetError, match="no pictures"):
        Dataset.from_tensors([], "a dog")


def test_missing_and_unreadable_captions_are_refused(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    write(tmp_path, a="a dog")
    with pytest.raises(DatasetError, match=r"b\.png: found no caption; write it into b\.txt"):
        Dataset.from_folder(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00dog")
    with pytest.raises(DatasetError, match=r"b\.txt: the file is not UTF-8"):
        Dataset.from_folder(tmp_path)
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DatasetError, match=r"b\.png: the caption is empty"):
        Dataset.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"captions": ["a <dog>", "b <dog>"]}, "found 2 captions for 3 pictures; give 3, or 1 for all of them"),
        ({"captions": []}, "found 0 captions"),
        ({"captions": ["a <dog>", "a <dog>", "a cat"]}, "image 3: caption 'a cat' contains none of the learned tokens"),
        ({"base_captions": ["a", "b"]}, "found 2 base captions"),
        ({"base_captions": "the <dog>"}, "image 1: base caption 'the <dog>' contains the learned token <dog>"),
        ({"masks": [torch.ones(8, 12)]}, "found 1 masks for 3 pictures; give 3"),
        (
            {"masks": [None, torch.ones(12, 8), None]},
            "mask 2: the mask is 8 x 12 pixels, its picture image 2 is 12 x 8",
        ),
        ({"tokens": [LearnedToken("<dog>")]}, "image 1: token <dog> has no initializer"),
        ({"tokens": [DOG, LearnedToken("<hat>", "hat")]}, "token <hat> is in no caption"),
        ({"class_images": [image()]}, "the class images have no caption"),
        ({"class_images": [image()], "class_captions": "a <dog>"}, "class image 1: class caption 'a <dog>' contains"),
        ({"class_images": [image()] * 3, "class_captions": ["a", "b"]}, "found 2 captions for 3 pictures"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(changes, reason):
    settings = {"captions": "a <dog>", "tokens": [DOG], **changes}
    with pytest.raises(DatasetError) as refused:
        Dataset.from_tensors([image()] * 3, **settings)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_token_without_initializer_trains_with_given_base_captions():
    dataset = Dataset.from_tensors(
        image()[None], "a <style> painting", base_captions="a painting", tokens=[LearnedToken("<style>")]
    )
    assert bases(dataset) == ["a painting"]


def test_token_given_twice_or_already_in_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="<Dog> is used twice"):
        Dataset.from_tensors(image()[None], "a <dog>", tokens=[DOG, LearnedToken("<Dog>", "cat")])
    check_tokens_are_new([DOG], {"dog": 1, "dog</w>": 2, "<": 3})
    for known in ("<dog>", "<dog></w>"):
        with pytest.raises(ConfigError, match="<dog> is already in the tokenizer's vocabulary; choose another"):
            check_tokens_are_new([DOG], {known: 1})
    with pytest.raises(ConfigError, match="already in"):
        check_tokens_are_new([LearnedToken("<DOG>")], {"<dog></w>": 1})


def test_masks_that_fit_no_picture_are_refused(tmp_path):
    draw(tmp_path, "a.png")
    draw(tmp_path / "mask", "A1.png")
    with pytest.raises(DatasetError, match=r"A1\.png: found no picture of this name"):
        Dataset.from_folder(tmp_path, captions="a dog")
    shutil.rmtree(tmp_path / "mask")
    draw(tmp_path / "mask", "a.png", "a.jpg")
    with pytest.raises(DatasetError, match="is a mask for the same picture"):
        Dataset.from_folder(tmp_path, captions="a dog")


def test_class_pictures_from_a_folder(tmp_path):
    draw(tmp_path, "a.png")
    kept = draw(tmp_path / "class", "0.png", "1.png", "2.png")
    settings = {"captions": "a <dog>", "tokens": [DOG], "class_folder": kept}
    dataset = Dataset.from_folder(tmp_path, **settings, class_captions="a dog", class_count=2)
    assert [example.picture.name for example in dataset.class_examples] == ["0.png", "1.png"]
    with pytest.raises(DatasetError, match="found 3 class pictures, expected 4"):
        Dataset.from_folder(tmp_path, **settings, class_captions="a dog", class_count=4)
    with pytest.raises(DatasetError, match="found no caption"):
        Dataset.from_folder(tmp_path, **settings)
    write(kept, **{"0": "one dog", "1": "two dogs", "2": "three dogs"})
    from_sidecars = Dataset.from_folder(tmp_path, **settings)
    assert [example.caption for example in from_sidecars.class_examples] == ["one dog", "two dogs", "three dogs"]


def test_fingerprint_follows_content_and_nothing_else(tmp_path):
    first, second = draw(tmp_path / "one", "a.png"), draw(tmp_path / "two", "z.png")
    settings = {"captions": "a <dog>", "tokens": [DOG]}
    original = Dataset.from_folder(first, **settings).fingerprint
    assert Dataset.from_folder(second, **settings).fingerprint == original

    def changed(**changes):
        return Dataset.from_folder(first, **{**settings, **changes}).fingerprint

    found = {
        original,
        changed(captions="the <dog>"),
        changed(base_captions="a puppy"),
        changed(tokens=[LearnedToken("<dog>", "dog", rows=2)]),
        changed(class_folder=second, class_captions="a dog"),
        changed(masks=draw(tmp_path / "masks", "a.png")),
    }
    Image.new("RGB", (12, 8), "red").save(first / "a.png")
    found.add(changed())
    assert len(found) == 7
    assert all(len(value) == 64 for value in found)


def test_identities_are_kept_and_count_in_the_fingerprint():
    anna = Dataset.from_tensors([image()], "a face", identities=["anna"])
    assert anna.examples[0].identity == "anna"
    assert anna.fingerprint != Dataset.from_tensors([image()], "a face").fingerprint


def test_preview_letterboxes_every_example():
    dataset = Dataset.from_tensors([image(1.0, (8, 16)), image(1.0, (5000, 1))], "a dog")
    preview = dataset.preview(32)
    assert preview.shape == (2, 32, 32, 3)
    assert torch.equal(preview[0, 8:24], torch.ones(16, 32, 3))
    assert preview[0, :8].max() == 0
    assert preview[1].sum(dim=(1, 2)).min() > 0


def test_importing_the_dataset_loads_no_training_library():
    code = (
        "import sys, comfyui_personalize.trainers.dataset, comfyui_personalize.trainers.cache;"
        "print([name for name in ('diffusers', 'transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
