"""The bench itself, on a model of random weights: it trains with our trainers and draws what our recipe draws."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

import methods  # noqa: E402 - lies in the folder that was just added
from methods import METHODS, Job, Painter  # noqa: E402
from scenes import SIDE  # noqa: E402
from subjects import SUBJECTS, write_style, write_subject  # noqa: E402

from comfyui_personalize.trainers.base import open_base  # noqa: E402
from comfyui_personalize.trainers.dco.sample import sample_pictures  # noqa: E402
from comfyui_personalize.trainers.dco.sample_config import SampleConfig, StyleSettings  # noqa: E402
from models import MODELS, write_tiny_checkpoint  # noqa: E402

PROMPTS = ["a <zib> at night", "a <zib> on the left and a red star on the right in the snow in <poster> style"]
WORDS = ["a creature at night", "a creature on the left and a red star on the right in the snow"]
SEEDS = [11, 12]
STEPS = 3


@pytest.fixture(scope="module", params=MODELS)
def taught(request, tmp_path_factory):
    """(checkpoint, a subject and a style taught a little by dco)."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_tiny_checkpoint(request.param, folder / "base.safetensors")
    lessons = [write_subject(folder / "zib", SUBJECTS["zib"]), write_style(folder / "poster", "poster")]
    return checkpoint, [METHODS["dco"](Job(checkpoint, lesson, folder, steps=2)) for lesson in lessons]


@pytest.mark.parametrize("scales", [(), (2.0,), (2.0, 0.5)], ids=["plain", "reward", "two rewards"])
def test_a_batch_has_the_pictures_that_the_recipe_draws(taught, scales):
    checkpoint, learned = taught
    drawn = Painter(checkpoint, learned).draw(PROMPTS, SEEDS, base_prompts=WORDS, reward_scales=scales, steps=STEPS)
    assert drawn.shape == (2, 3, SIDE, SIDE)
    style = StyleSettings(path=checkpoint, reward_scale=scales[1]) if len(scales) == 2 else None
    for prompt, words, seed, picture in zip(PROMPTS, WORDS, SEEDS, drawn):
        config = SampleConfig(
            prompt=prompt,
            base_prompt=words,
            text_scale=methods.TEXT_SCALE,
            reward_scale=scales[0] if scales else -1,
            steps=STEPS,
            width=SIDE,
            height=SIDE,
        )
        cpu = torch.device("cpu")
        ((_, expected),) = sample_pictures(
            config, open_base(checkpoint), learned, device=cpu, seeds=[seed], style=style
        )
        difference = np.abs(picture.permute(1, 2, 0).numpy() * 255 - np.asarray(expected))
        assert difference.max() <= 1, "only rounding to bytes"


def test_without_reward_the_base_model_draws(taught):
    checkpoint, learned = taught
    base = Painter(checkpoint).draw(WORDS, SEEDS, steps=STEPS)
    guided = Painter(checkpoint, learned[:1])
    unrewarded = guided.draw(PROMPTS, SEEDS, base_prompts=WORDS, reward_scales=(0.0,), steps=STEPS)
    torch.testing.assert_close(unrewarded, base, rtol=0, atol=1e-5)
    rewarded = guided.draw(PROMPTS, SEEDS, base_prompts=WORDS, reward_scales=(2.0,), steps=STEPS)
    assert (rewarded - base).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_is_lengthened_ends_like_one_that_was_long_at_once(method, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.SETTINGS, "checkpoint_every", 2)
    checkpoint = write_tiny_checkpoint("world_sdxl", tmp_path / "base.safetensors")
    lesson = write_subject(tmp_path / "mok", SUBJECTS["mok"])
    long = Job(checkpoint, lesson, tmp_path / "at_once", steps=4, seed=3)
    METHODS[method](long)
    METHODS[method](Job(checkpoint, lesson, tmp_path / "grown", steps=2, seed=3))
    METHODS[method](Job(checkpoint, lesson, tmp_path / "grown", steps=4, seed=3))
    names = [f"{kind}/{method}_mok_3.safetensors" for kind in ("loras", "embeddings")]
    for name in names:
        at_once, grown = (load_file(tmp_path / folder / name) for folder in ("at_once", "grown"))
        assert at_once.keys() == grown.keys()
        for key in at_once:
            torch.testing.assert_close(grown[key], at_once[key], rtol=0, atol=0)


def test_the_methods_learn_different_things(tmp_path):
    checkpoint = write_tiny_checkpoint("world_sdxl", tmp_path / "base.safetensors")
    lesson = write_subject(tmp_path / "zib", SUBJECTS["zib"])
    learned = [METHODS[name](Job(checkpoint, lesson, tmp_path, steps=3)) for name in METHODS]
    rows = [item.embeddings[0].rows["clip_l"] for item in learned]
    assert [token.trigger for item in learned for token in item.tokens] == ["<zib>"] * len(METHODS)
    assert not torch.equal(rows[0], rows[1])
