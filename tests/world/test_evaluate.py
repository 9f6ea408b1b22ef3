"""What the models are measured on was in no training data; a missing host is said in a sentence."""

import random
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def evaluate(load_helper):
    """The module; it puts the folders of its neighbours on the path, which other tests must not see first."""
    before = list(sys.path)
    module = load_helper("world/evaluate.py")
    sys.path[:] = before + [folder for folder in sys.path if folder not in before]
    return module


def test_the_training_captions_are_those_of_the_training_pictures(evaluate):
    from comfyui_personalize.trainers.tokenizer import load_tokenizer

    dataset = evaluate.dataset
    examples = dataset.make_examples(4, dataset.SEED, load_tokenizer())
    scenes = [evaluate.random_scene(random.Random(f"{dataset.SEED}/{number}")) for number in range(4)]
    whole = [index for index in range(4) if examples.sizes[index].tolist() == [64, 64, 0, 0, 64, 64]]
    assert whole and all(torch.equal(examples.pictures[i], evaluate.draw_bytes(scenes[i])) for i in whole)
    assert {evaluate.caption(scene) for scene in scenes} <= evaluate._training_captions()


@pytest.mark.parametrize("kind", ["shape", "pair", "creature", "person"])
def test_no_caption_was_seen_in_training(evaluate, kind):
    scenes = evaluate.unseen_scenes(kind, 60)
    assert scenes == evaluate.unseen_scenes(kind, 60)
    assert not {evaluate.caption(scene) for scene in scenes} & evaluate._training_captions()
    assert {len(scene.things) for scene in scenes} == {2 if kind == "pair" else 1}
    assert 15 <= sum(scene.style == "flat" for scene in scenes) <= 42  # 48 % in training
    if kind == "shape":
        assert 6 <= sum(scene.things[0].texture == "striped" for scene in scenes) <= 26  # 25 %


def test_a_missing_host_is_said(evaluate, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(evaluate.NoHostError, match="that folder does not hold ComfyUI's main.py"):
        evaluate.import_host()
    monkeypatch.setattr(evaluate, "find_comfyui", lambda: None)
    with pytest.raises(evaluate.NoHostError, match="^no ComfyUI found to sample with; set COMFYUI_PATH"):
        evaluate.import_host()
