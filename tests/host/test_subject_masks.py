"""Soft Subject Masks in the host: lists of any sizes, chains of training pictures, and what is refused."""

import gc
import shutil

import pytest
import torch

FOLDER = "tiny_clipseg"


@pytest.fixture(scope="module")
def clipseg(host_modules, load_helper):
    """The host's folder with a CLIPSeg with random weights, and a CLIP, which is none."""
    judges, root = load_helper("tiny/judges.py"), host_modules.base / "models" / "clipseg"
    judges.write_clipseg(root / FOLDER)
    judges.write_clip(root / "a_clip")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def node(comfy, clipseg):
    from comfyui_personalize.nodes.subject_masks import SoftSubjectMasks

    return SoftSubjectMasks


@pytest.fixture
def run(node):
    """run(**inputs) -> chain of pictures, list of masks; inputs are lists, as the host gives them."""

    def execute(subject="dog", templates="a {}\nthe {}", folder=FOLDER, **inputs):
        clone = node.PREPARE_CLASS_CLONE(None)
        return clone.execute(clipseg_folder=[folder], subject=[subject], templates=[templates], **inputs).args

    return execute


@pytest.fixture
def chain(comfy, load_helper):
    """Two training pictures of other sizes, as Training Picture nodes hand them on."""
    from comfyui_personalize.trainers.dataset import Example
    from comfyui_personalize.trainers.pictures import Picture

    draw = load_helper("host/training_graphs.py").picture
    sizes = {"one": (48, 40), "two": (30, 64)}
    tensors = {
        name: torch.frombuffer(bytearray(draw(seed, size).tobytes()), dtype=torch.uint8).view(*size[::-1], 3)
        for seed, (name, size) in enumerate(sizes.items())
    }
    return tuple(Example(Picture.from_tensor(one, name), f"a <dog> {name}", "") for name, one in tensors.items())


def test_a_mask_for_each_picture_of_batches_and_lists(run):
    images = [torch.rand(2, 32, 40, 3), torch.rand(1, 50, 20, 3)]
    pictures, masks = run(images=images)
    assert [mask.shape for mask in masks] == [(1, 32, 40), (1, 32, 40), (1, 50, 20)]
    assert all(mask.dtype == torch.float32 and 0 <= mask.min() < mask.max() <= 1 for mask in masks)
    assert [example.mask.size for example in pictures] == [(32, 40), (32, 40), (50, 20)]


def test_a_chain_becomes_a_dataset_with_masks(run, chain):
    from comfyui_personalize.nodes.dataset import PersonalizationDataset

    pictures, masks = run(pictures=[chain])
    widgets = {"token": "<dog>", "initializer": "dog", "rows_per_token": 1, "folder": "(none)", "captions": ""}
    widgets |= {"base_captions": "", "class_folder": "(none)", "class_caption": ""}
    listed = {name: [value] for name, value in widgets.items()}
    dataset = PersonalizationDataset.execute(**listed, pictures=[pictures]).args[0]
    assert [example.caption for example in dataset.examples] == ["a <dog> one", "a <dog> two"]
    for example, mask in zip(dataset.examples, masks):
        cut = example.load(example.picture.size)
        assert torch.allclose(cut.mask, mask, atol=1 / 255)
    unmasked = PersonalizationDataset.execute(**listed, pictures=[chain]).args[0]
    assert unmasked.examples[0].mask is None


def test_what_is_hard_to_find_is_named(run, monkeypatch, caplog):
    from comfyui_personalize.trainers.perfusion.masks import Segmenter

    def dim(value):
        monkeypatch.setattr(Segmenter, "masks", lambda self, shown, _: (torch.full((9, 9), value) for _ in shown))

    dim(0.5)
    run(images=[torch.rand(1, 9, 9, 3)])
    assert "likely" not in caplog.text
    dim(0.04)
    run(images=[torch.rand(1, 9, 9, 3)])
    assert "picture 1: dog at most 4% likely" in caplog.text
    dim(0.0)
    refused(run, "mask of picture 1: the mask is black everywhere", images=[torch.rand(1, 9, 9, 3)])


def test_nothing_stays_behind_also_after_a_cancel(comfy, run):
    images = [torch.rand(1, 32, 32, 3)]

    def left():
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing).__name__ == "CLIPSegForImageSegmentation"]

    run(images=images)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(images=images)
    assert not left()


def test_only_fitting_folders_are_listed_and_others_refused_before_queueing(node):
    (options,) = [entry.options for entry in node.define_schema().inputs if entry.id == "clipseg_folder"]
    assert options == ["none", FOLDER]
    assert node.validate_inputs(clipseg_folder=[FOLDER]) is True
    assert node.validate_inputs(clipseg_folder=[None]) is True
    assert "'a_clip'" in node.validate_inputs(clipseg_folder=["a_clip"])
    assert "choose a clipseg_folder" in node.validate_inputs(clipseg_folder=["none"])
    assert node.fingerprint_inputs(clipseg_folder=[FOLDER]) and not node.fingerprint_inputs(clipseg_folder=["gone"])


def refused(run, *parts, **inputs):
    from comfyui_personalize.models.errors import PersonalizeError

    with pytest.raises(PersonalizeError) as raised:
        run(**inputs)
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


def test_what_cannot_be_masked_is_refused(run, chain):
    grey = [torch.full((1, 20, 20, 3), 0.5)]
    refused(run, "pictures come from no place")
    refused(run, "two places", images=grey, pictures=[chain])
    refused(run, "no subject to look for", images=grey, subject=" ")
    refused(run, "has 0 places for the word", images=grey, templates="a dog")
    refused(run, "there is no CLIPSeg to look with", images=grey, folder="none")
    refused(run, "there is no folder 'gone'", images=grey, folder="gone")
    refused(run, "there are no pictures", images=[torch.zeros(0, 20, 20, 3)])
    refused(run, "picture 1 contains NaN", images=[torch.full((1, 9, 9, 3), torch.nan)])
