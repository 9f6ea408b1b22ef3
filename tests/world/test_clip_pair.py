"""The small world's CLIP pair: its file, its loss, and that the committed one knows pictures by their captions."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

import clip_pair  # noqa: E402 - lies in the folder that was just added
from captions import caption  # noqa: E402
from dataset import draw_bytes, in_unit_range, padded_ids  # noqa: E402
from generator import random_scene  # noqa: E402
from scenes import STYLES  # noqa: E402
from weights import path_of  # noqa: E402

from comfyui_personalize.trainers.tokenizer import load_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A pair with random weights, and its file."""
    torch.manual_seed(0)
    model = clip_pair.build_pair().eval()
    path = tmp_path_factory.mktemp("clip") / "pair.safetensors"
    clip_pair.write_pair(path, model, {"text to picture": 0.5})
    return model, path


@pytest.fixture(scope="module")
def shown(tokenizer):
    """Sixteen scenes: preprocessed pictures and the ids of their captions."""
    scenes = [random_scene(random.Random(f"test/{number}")) for number in range(16)]
    pictures = clip_pair.preprocess(in_unit_range(torch.stack([draw_bytes(scene) for scene in scenes])))
    return pictures, torch.tensor([padded_ids(tokenizer, caption(scene)) for scene in scenes])


def test_the_file_holds_the_pair_and_its_sizes(written):
    model, path = written
    loaded, _ = clip_pair.load_pair(path)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.half().float(), rtol=0, atol=0)
    assert path.stat().st_size < 4.5e6
    assert len(loaded.vision_model.encoder.layers) >= 3


def test_both_halves_load_into_the_classes_that_users_have(written, shown):
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    whole, _ = clip_pair.load_pair(written[1])
    pictures, ids = shown
    halves = {
        CLIPVisionModelWithProjection: (whole.config.vision_config, ("vision_model.", "visual_projection.")),
        CLIPTextModelWithProjection: (whole.config.text_config, ("text_model.", "text_projection.")),
    }
    found = []
    for half, (config, prefixes) in halves.items():
        model = half(config).eval()
        weights = {name: weight for name, weight in whole.state_dict().items() if name.startswith(prefixes)}
        model.load_state_dict(weights)
        found.append(model)
    vision, text = found
    with torch.no_grad():
        embeds = F.normalize(vision(pixel_values=pictures).image_embeds, dim=-1)
        torch.testing.assert_close(embeds, clip_pair.embed_pictures(whole, pictures))
        # Ours leaves out the end tokens behind the longest caption.
        embeds = F.normalize(text(input_ids=ids).text_embeds, dim=-1)
        torch.testing.assert_close(embeds, clip_pair.embed_texts(whole, ids))


def test_pictures_of_other_sizes_are_cropped_in_the_middle():
    picture = torch.zeros(1, 3, 64, 128)
    picture[..., 32:96] = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(clip_pair.preprocess(picture), clip_pair.preprocess(picture[..., 32:96]))
    assert clip_pair.preprocess(torch.rand(2, 3, 200, 90)).shape == (2, 3, 64, 64)


def test_normalized_pictures_have_clips_mean_and_spread():
    picture = torch.tensor(clip_pair.MEAN) + torch.tensor(clip_pair.STD)
    normalized = clip_pair.preprocess(picture.view(1, 3, 1, 1).expand(1, 3, 64, 64))
    torch.testing.assert_close(normalized, torch.ones(1, 3, 64, 64))


def test_the_loss_is_that_of_the_right_answers():
    vectors = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    same, log_scale = torch.eye(8), torch.tensor(2.0)
    logits = math.exp(2) * vectors @ vectors.roll(1, 0).T
    expected = -(logits.softmax(0).diagonal().log() + logits.softmax(1).diagonal().log()).mean() / 2
    loss = clip_pair.contrastive_loss(vectors, vectors.roll(1, 0), log_scale, same)
    torch.testing.assert_close(loss, expected)
    assert clip_pair.contrastive_loss(vectors, vectors, log_scale, same) < loss


def test_pictures_with_one_caption_are_both_right():
    vectors = torch.eye(3)[[0, 0, 1, 2]]
    same = vectors @ vectors.T
    log_scale = torch.tensor(10.0)  # beyond the largest, which holds instead: any wrong answer would cost 100
    loss = clip_pair.contrastive_loss(vectors, vectors, log_scale, same)
    # The two that cannot be told apart cost log 2 each, whichever of them the other's caption is taken for.
    assert loss.item() == pytest.approx(2 * math.log(2) / 4, abs=1e-5)
    exchanged = clip_pair.contrastive_loss(vectors, vectors[[1, 0, 2, 3]], log_scale, same)
    assert exchanged.item() == pytest.approx(loss.item())


def test_a_short_training_finds_the_captions(shown):
    torch.manual_seed(0)
    model = clip_pair.build_pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    pictures, ids = shown
    losses = []
    for _ in range(30):
        image, text = clip_pair.embed_pictures(model, pictures), clip_pair.embed_texts(model, ids)
        loss = clip_pair.contrastive_loss(image, text, model.logit_scale, torch.eye(len(ids)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_one_thing_is_changed_at_a_time():
    for number in range(60):
        rng = random.Random(number)
        scene = random_scene(rng)
        words = caption(scene)
        for name, other in clip_pair.one_thing_changed(rng, scene).items():
            assert caption(other) != words, name
            assert len(other.things) == len(scene.things)
            same = other.background == scene.background, other.style == scene.style, other.things == scene.things
            assert sum(same) == 2, name
            assert other.style in STYLES


def test_the_committed_pair_knows_pictures_by_their_captions(tokenizer):
    model, _ = clip_pair.load_pair(path_of(clip_pair.FILE))
    scores = clip_pair.measure(model, tokenizer, 128)
    assert scores["text to picture"] > 0.7, scores
    assert scores["picture to text"] > 0.7, scores
    assert min(scores["background"], scores["colour"]) > 0.9, scores
