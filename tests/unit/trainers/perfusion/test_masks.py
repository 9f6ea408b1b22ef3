"""Soft masks by CLIPSeg: the numbers of transformers' own class, at the picture's size, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.trainers.perfusion.masks import load_segmenter, subject_prompts
from comfyui_personalize.trainers.perfusion.prompts import TEMPLATES
from comfyui_personalize.trainers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def judges(load_helper):
    return load_helper("tiny/judges.py")


@pytest.fixture(scope="module")
def folder(judges, tmp_path_factory):
    """A small CLIPSeg with random weights."""
    return judges.write_clipseg(tmp_path_factory.mktemp("written") / "tiny_clipseg", tokenizer=load_tokenizer())


@pytest.fixture(scope="module")
def segmenter(folder):
    return load_segmenter(folder)


def picture(width, height, seed=0):
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def test_the_masks_of_the_prompts_are_averaged(folder, segmenter):
    from transformers import CLIPSegForImageSegmentation

    image, prompts = picture(32, 32), subject_prompts("dog")
    (mask,) = segmenter.masks([image], prompts)
    tokens = load_tokenizer(folder)(prompts, padding=True, return_tensors="pt")
    pixels = segmenter.preprocessing(image)[None].repeat(len(prompts), 1, 1, 1)
    with torch.no_grad():
        logits = CLIPSegForImageSegmentation.from_pretrained(folder).eval()(pixel_values=pixels, **tokens).logits
    assert logits.std() > 0.05 and logits.mean(dim=(1, 2)).std() > 1e-3
    torch.testing.assert_close(mask, logits.sigmoid().mean(dim=0), rtol=1e-4, atol=1e-5)


def test_a_mask_is_as_large_as_its_picture_and_of_all_of_it(segmenter):
    sizes = [(90, 40), (33, 70)]
    masks = list(segmenter.masks([picture(*size) for size in sizes], ["a dog"]))
    assert [mask.shape for mask in masks] == [(40, 90), (70, 33)]
    assert all(mask.dtype == torch.float32 and 0 <= mask.min() < mask.max() <= 1 for mask in masks)
    wide = Image.new("RGB", (96, 32))
    wide.paste((255, 255, 255), (88, 0, 96, 32))
    seen = segmenter.preprocessing(wide)
    assert seen[0, :, -1].min() > seen[0, :, 0].max()


def test_the_authors_templates_unless_others_are_given():
    assert subject_prompts("teddy bear") == [template.format("teddy bear") for template in TEMPLATES]
    assert subject_prompts(" cat ", "a {}\n\nthe {}") == ["a cat", "the cat"]
    with pytest.raises(ConfigError, match="no subject to look for"):
        subject_prompts("  ")
    with pytest.raises(ConfigError, match="has 0 places for the word"):
        subject_prompts("cat", "a photo")


def test_other_networks_and_damaged_files_are_refused(judges, tmp_path):
    with pytest.raises(FormatError, match="tiny_clip: holds no CLIPSeg"):
        load_segmenter(judges.write_clip(tmp_path / "tiny_clip"))
    folder = judges.write_clipseg(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(FormatError, match="damaged: could not be read .*download its files again"):
        load_segmenter(folder)


def test_masks_that_are_no_numbers_are_refused(folder):
    broken = load_segmenter(folder)
    with torch.no_grad():
        next(broken.network.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(IncompatibleModelError, match="tiny_clipseg: the network answers with values that are no"):
        next(broken.masks([picture(32, 32)], ["a dog"]))
