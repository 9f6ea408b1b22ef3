"""Every picture is encoded once; latents are drawn by an explicit generator."""

import pytest
import torch

from comfyui_personalize.models.errors import TrainingError
from comfyui_personalize.trainers.cache import LatentCache, stack_masks
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.progress import Cancelled, SilentProgress


class BlockVAE:
    """Encodes each block of 8 x 8 pixels to its mean colour, with a fixed deviation."""

    def __init__(self, std=0.5, dtype=torch.float32):
        self.std, self.dtype, self.images = std, dtype, []

    def encode_moments(self, images):
        assert not torch.is_grad_enabled()
        self.images.append(images)
        mean = torch.nn.functional.avg_pool2d(images, 8).to(self.dtype)
        return mean, None if self.std is None else torch.full_like(mean, self.std)


class Watcher(SilentProgress):
    def __init__(self, cancel_after=None):
        self.reports, self.asked, self.cancel_after = [], 0, cancel_after

    def report(self, step, total, message="", preview=None):
        self.reports.append((step, total, message))

    def cancelled(self):
        self.asked += 1
        return self.cancel_after is not None and self.asked > self.cancel_after


def pictures(*sizes, masks=None):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(*size, 3, generator=generator) for size in sizes]
    return Dataset.from_tensors(images, "a dog", masks=masks).examples


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_picture_is_encoded_once_however_often_it_is_drawn():
    vae, watcher = BlockVAE(), Watcher()
    cache = LatentCache.build(pictures((16, 20), (40, 16)), vae, size=16, progress=watcher)
    draws = generator()
    for index in [0, 1] * 10:
        cache.sample(index, draws)
    assert len(vae.images) == len(cache) == 2
    assert vae.images[0].shape == (1, 3, 16, 16)
    assert watcher.reports == [(1, 2, "encoding pictures: image 1"), (2, 2, "encoding pictures: image 2")]


def test_sample_is_mean_plus_deviation_times_noise():
    examples = pictures((16, 16))
    cache = LatentCache.build(examples, BlockVAE(std=0.5), size=16)
    mean = torch.nn.functional.avg_pool2d(examples[0].load(16).pixels, 8)
    draws = torch.stack([cache.sample(0, seeded).latents for seeded in [generator(5)] for _ in range(4000)])
    # 4000 draws: the mean is known to 0.5 / sqrt(4000) = 0.008, so five of these are far outside chance.
    torch.testing.assert_close(draws.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full_like(mean, 0.5), atol=0.04, rtol=0)
    assert torch.equal(cache.sample(0, generator(1)).latents, cache.sample(0, generator(1)).latents)


@pytest.mark.parametrize("std", [None, 0.0])
def test_vae_without_deviation_gives_its_mean(std):
    examples = pictures((16, 16))
    cache = LatentCache.build(examples, BlockVAE(std=std), size=16)
    expected = torch.nn.functional.avg_pool2d(examples[0].load(16).pixels, 8)
    assert torch.equal(cache.sample(0, generator()).latents, expected)


def test_generator_advances_alike_whatever_is_drawn():
    examples = pictures((16, 30), (16, 16))
    states = []
    for settings, vae, index in [
        ({}, BlockVAE(), 0),
        ({"crop": "random", "variants": 5, "flip": True}, BlockVAE(), 0),
        ({}, BlockVAE(std=None), 1),
    ]:
        draws = generator(3)
        LatentCache.build(examples, vae, size=16, **settings).sample(index, draws)
        states.append(draws.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_half_precision_latents_are_kept_in_float32():
    cache = LatentCache.build(pictures((16, 16)), BlockVAE(dtype=torch.bfloat16), size=16)
    assert cache.sample(0, generator()).latents.dtype == torch.float32


def test_random_cuts_are_seeded_and_all_drawn():
    examples = pictures((16, 200))

    def latents(seed):
        cache = LatentCache.build(examples, BlockVAE(std=None), size=16, crop="random", variants=4, seed=seed)
        draws = generator()
        return cache, torch.stack([cache.sample(0, draws).latents for _ in range(64)])

    cache, first = latents(1)
    assert cache.variants(0) == 4
    assert len(first.flatten(1).unique(dim=0)) == 4
    assert torch.equal(first, latents(1)[1])
    assert not torch.equal(first, latents(2)[1])


def test_flip_adds_the_mirror_image_of_every_cut():
    vae = BlockVAE()
    cache = LatentCache.build(pictures((16, 200)), vae, size=16, crop="random", variants=3, flip=True)
    assert cache.variants(0) == len(vae.images) == 6
    for plain, mirrored in zip(vae.images[::2], vae.images[1::2]):
        assert torch.equal(mirrored, plain.flip(-1))


def test_picture_with_a_single_possible_cut_is_encoded_once():
    vae = BlockVAE()
    cache = LatentCache.build(pictures((24, 24)), vae, size=16, crop="random", variants=8)
    assert cache.variants(0) == 8
    assert len(vae.images) == 1


def test_time_ids_are_the_authors_or_the_true_ones():
    examples = pictures((32, 64))
    square = LatentCache.build(examples, BlockVAE(), size=16)
    assert square.sample(0, generator()).time_ids == (16, 16, 0, 0, 16, 16)
    # 32 x 64 covers 16 x 16 as 16 x 32, of which the middle starts at column 8.
    true = LatentCache.build(examples, BlockVAE(), size=16, size_conditioning="true")
    assert true.sample(0, generator()).time_ids == (32, 64, 0, 8, 16, 16)
    oblong = LatentCache.build(examples, BlockVAE(), size=(16, 32))
    assert oblong.sample(0, generator()).time_ids == (16, 32, 0, 0, 16, 32)
    assert oblong.sample(0, generator()).latents.shape == (3, 2, 4)


def test_masks_are_averaged_over_latent_cells_and_filled_with_ones():
    mask = torch.zeros(16, 16)
    mask[:, :12] = 1
    cache = LatentCache.build(pictures((16, 16), (16, 16), masks=[mask, None]), BlockVAE(), size=16)
    torch.testing.assert_close(cache.sample(0, generator()).mask, torch.tensor([[[1.0, 0.5], [1.0, 0.5]]]))
    assert torch.equal(cache.sample(1, generator()).mask, torch.ones(1, 2, 2))
    assert LatentCache.build(pictures((16, 16)), BlockVAE(), size=16).sample(0, generator()).mask is None


def test_stacked_masks_count_whole_pictures_as_ones():
    mask = torch.ones(16, 16)
    mask[:8] = 0
    masked = LatentCache.build(pictures((16, 16), masks=[mask]), BlockVAE(), size=16).sample(0, generator())
    plain = LatentCache.build(pictures((16, 16)), BlockVAE(), size=16).sample(0, generator())
    assert stack_masks([plain, plain]) is None
    stacked = stack_masks([masked, plain])
    assert stacked.shape == (2, 1, 2, 2)
    assert stacked[0].mean() == 0.5
    assert stacked[1].mean() == 1


@pytest.mark.parametrize("cancel_after", [0, 3])
def test_cancelling_stops_before_the_next_cut(cancel_after):
    vae = BlockVAE()
    with pytest.raises(Cancelled):
        LatentCache.build(
            pictures((16, 90), (16, 90)),
            vae,
            size=16,
            crop="random",
            variants=4,
            progress=Watcher(cancel_after),
        )
    assert len(vae.images) == cancel_after


def test_vae_that_overflows_is_refused_by_name():
    with pytest.raises(TrainingError, match="image 1: the VAE returned values that are not numbers; run it in float32"):
        LatentCache.build(pictures((16, 16)), BlockVAE(std=float("nan")), size=16)


def test_cached_tensors_can_be_trained_on_when_made_in_inference_mode():
    with torch.inference_mode():
        examples = pictures((16, 16))
    latents = LatentCache.build(examples, BlockVAE(), size=16).sample(0, generator()).latents
    weight = torch.ones_like(latents, requires_grad=True)
    (weight * latents).sum().backward()
    assert torch.equal(weight.grad, latents)


def test_masks_are_shrunk_as_asked_and_flipped_with_their_pictures():
    mask = torch.zeros(16, 16)
    mask[:, :8] = 0.5
    asked = []

    def shrink(pixels, size, name):
        asked.append((tuple(pixels.shape), size, name))
        return pixels[:, ::8, ::8] * 2

    examples = pictures((16, 16), (16, 16), masks=[mask, None])
    cache = LatentCache.build(examples, BlockVAE(), size=16, flip=True, shrink_mask=shrink)
    assert asked == [((1, 16, 16), (2, 2), "image 1")] * 2
    expected = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    draws, both = generator(), set()
    for _ in range(16):
        found = cache.sample(0, draws).mask
        both.add(tuple(found[0, 0].round().tolist()))
        torch.testing.assert_close(found.flip(-1) if found[0, 0, 1] > 0.5 else found, expected, rtol=0, atol=0.01)
    assert both == {(1.0, 0.0), (0.0, 1.0)}
    first = cache.masks([1, 0])
    assert torch.equal(first[0], torch.ones(1, 2, 2)) and torch.equal(first[1], cache.masks([0])[0])
    assert LatentCache.build(pictures((16, 16)), BlockVAE(), size=16).masks([0]) is None
