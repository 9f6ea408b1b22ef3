"""Properties of guidance by previews, and its gradients against finite differences."""

import math

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.lookahead import preview
from comfyui_personalize.models.lookahead.preview_guidance import (
    consistency_preview,
    gradient_before,
    guided_shift,
    preview_gradient,
    weighted_loss,
)
from comfyui_personalize.models.lookahead.preview_losses import (
    clip_pixels,
    cut_out,
    embedding_loss,
    fitted,
    mean_loss,
    picture_loss,
    square_around,
)
from comfyui_personalize.models.schedules import NoiseSchedule


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms(values):
    return values.square().flatten(1).mean(1).sqrt()


def test_the_preview_is_that_of_training_in_the_samplers_units():
    schedule, timesteps = NoiseSchedule.scaled_linear(), torch.tensor([1, 400, 999])
    alpha_bar = schedule.alphas_cumprod[timesteps]
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    noisy, noise = draws(3, 4, 5, 6), draws(3, 4, 5, 6, seed=1)
    expanded = noisy * (1 + sigmas**2).sqrt().view(-1, 1, 1, 1)  # x = x_0 + σ ε from √ᾱ x_0 + √(1-ᾱ) ε
    denoised = expanded - sigmas.view(-1, 1, 1, 1) * noise
    got = consistency_preview(denoised, expanded, sigmas, timesteps)
    torch.testing.assert_close(got, preview(schedule, noise, noisy, timesteps), rtol=1e-4, atol=1e-4)


def test_a_preview_says_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"found sigmas \(2,\), timesteps \(1,\)"):
        consistency_preview(draws(1, 4, 2, 2), draws(1, 4, 2, 2), torch.ones(2), torch.ones(1))


def decode(latents):
    """A smooth decoder: 2 x 2 pixels for each place, three mixtures of the channels."""
    mixed = torch.einsum("bchw,ck->bkhw", latents, draws(4, 3, seed=7).to(latents)).tanh()
    return mixed.repeat_interleave(2, -1).repeat_interleave(2, -2)


def numeric(function, x, step=1e-5):
    """Central differences of a function of one tensor, all elements."""
    flat = x.flatten()
    found = torch.zeros_like(flat)
    for index in range(len(flat)):
        moved = [flat.clone(), flat.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        found[index] = (function(moved[0].view_as(x)) - function(moved[1].view_as(x))) / (2 * step)
    return found.view_as(x)


@pytest.mark.parametrize("distance", ["mean squared", "mean absolute"])
def test_the_gradient_is_that_of_finite_differences(distance):
    """Through the decoder, and through a "model" in front of it."""
    loss = picture_loss(draws(3, 6, 4).double().tanh(), distance)

    def measured(pictures):  # in double precision, so that differences of small numbers mean something
        target = fitted(draws(1, 3, 6, 4).double().tanh(), *pictures.shape[-2:])
        difference = pictures - target
        return (difference.square() if distance == "mean squared" else difference.abs()).mean()

    def model(x):
        return (x + 0.3 * x.flip(1)).sin()

    x = draws(1, 4, 3, 2, seed=3).double().requires_grad_()
    latents = model(x)
    gradient, losses = preview_gradient(latents, decode, loss)
    torch.testing.assert_close(losses, measured(decode(latents.detach()))[None].float(), rtol=1e-5, atol=0)
    expected = numeric(lambda one: measured(decode(one)), latents.detach())
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-6)
    expected = numeric(lambda one: measured(decode(model(one))), x.detach())
    torch.testing.assert_close(gradient_before(latents, x, gradient), expected.float(), rtol=1e-3, atol=1e-6)


def test_each_sample_has_a_gradient_of_its_own():
    loss, latents = picture_loss(draws(3, 4, 4)), draws(3, 4, 2, 2)
    together = preview_gradient(latents, decode, loss)
    for index in range(3):
        alone = preview_gradient(latents[index : index + 1], decode, loss)
        assert torch.equal(together[0][index], alone[0][0]) and torch.equal(together[1][index], alone[1][0])


def test_half_precision_keeps_small_gradients():
    """A mean over a million pixels has gradients below float16's smallest number."""
    x = draws(1, 4, 2, 2).half().requires_grad_()
    gradient = draws(1, 4, 2, 2, seed=1) * 1e-9
    assert not torch.autograd.grad(x * 2, x, gradient.half())[0].any()
    torch.testing.assert_close(gradient_before(x * 2, x, gradient), 2 * gradient, rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_a_scale_means_the_same_whatever_the_size_of_the_gradient(size):
    gradient = draws(2, 4, 3, 5) * size
    shift = guided_shift(gradient, torch.full((2,), 1e30), 0.3)
    torch.testing.assert_close(rms(shift), torch.full((2,), 0.3))
    directions = [torch.nn.functional.normalize(each.flatten(1)) for each in (shift, gradient)]
    torch.testing.assert_close(directions[0], -directions[1])


def test_scale_zero_shifts_nothing():
    assert not guided_shift(draws(2, 4, 3, 5), torch.ones(2), 0.0).any()


def test_a_shift_ends_where_the_loss_would_be_zero():
    """L = g·d reaches zero after d = L / |g|: (3, 4) has length 5, so L = 10 takes a shift of length 2."""
    gradient = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    shift = guided_shift(gradient, torch.tensor([10.0]), 1e6)
    torch.testing.assert_close(shift.flatten(), torch.tensor([-1.2, -1.6]))
    # A sampler that takes a quarter of a shift needs four times as much of it.
    shift = guided_shift(gradient, torch.tensor([10.0]), 1e6, taken=0.25)
    torch.testing.assert_close(shift.flatten(), torch.tensor([-4.8, -6.4]))
    assert not guided_shift(gradient, torch.zeros(1), 1e6).any()


def test_samples_without_a_usable_gradient_stay():
    gradient = torch.stack([torch.zeros(4, 2, 2), draws(4, 2, 2), torch.full((4, 2, 2), math.nan), draws(4, 2, 2)])
    shift = guided_shift(gradient, torch.tensor([1.0, 1.0, 1.0, math.nan]), 0.5)
    assert torch.isfinite(shift).all()
    assert [bool(one.any()) for one in shift] == [False, True, False, False]


def test_only_the_region_counts_for_the_size():
    region = torch.zeros(1, 1, 4, 4)
    region[..., :2] = 1
    gradient = draws(2, 4, 4, 4) * region
    shift = guided_shift(gradient, torch.full((2,), 1e9), 0.5, region=region)
    assert not shift[..., 2:].any()
    torch.testing.assert_close(rms(shift[..., :2]), torch.full((2,), 0.5))


def test_losses_are_weighted_and_one_of_another_shape_is_refused():
    first, second = picture_loss(torch.ones(3, 4, 4)), picture_loss(-torch.ones(3, 4, 4))
    pictures = torch.full((2, 3, 8, 8), 0.5)  # (0.5)² = 0.25 and (1.5)² = 2.25 away
    torch.testing.assert_close(weighted_loss([(2.0, first), (1.0, second)])(pictures), torch.full((2,), 2.75))
    torch.testing.assert_close(mean_loss([first, second])(pictures), torch.full((2,), 1.25))
    with pytest.raises(ConfigError, match=r"one value for each of 2 pictures, got \(\)"):
        weighted_loss([(1.0, lambda pictures: pictures.mean())])(pictures)


@pytest.mark.parametrize(("distance", "expected"), [("mean squared", 1.0), ("mean absolute", 1.0)])
def test_a_region_leaves_the_rest_free(distance, expected):
    region = torch.zeros(4, 4)
    region[:, :2] = 1
    pictures = torch.zeros(1, 3, 8, 8)
    pictures[..., 4:] = 9.0
    loss = picture_loss(torch.ones(3, 4, 4), distance, region)
    inside = loss(pictures)
    assert 0.5 < inside.item() / expected < 20  # antialiasing mixes a little of the other half in
    pictures[..., 6:] = -99.0
    torch.testing.assert_close(loss(pictures), inside)


def test_bad_settings_of_a_picture_loss_are_refused():
    with pytest.raises(ConfigError, match="black everywhere"):
        picture_loss(torch.ones(3, 4, 4), region=torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="not by 'median'"):
        picture_loss(torch.ones(3, 4, 4), "median")


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 3), (40, 7)])
def test_a_target_covers_every_shape(shape):
    columns = torch.arange(12.0).expand(1, 3, 8, 12)
    got = fitted(columns, *shape)
    assert got.shape == (1, 3, *shape)
    pixel = min(8 / shape[0], 12 / shape[1])  # of the result, in columns of the target
    assert abs(got.mean() - 5.5) < 0.6 * pixel


def test_embeddings_are_compared_by_their_angle():
    targets = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    loss = embedding_loss(lambda pictures: pictures.flatten(1)[:, :2], targets)
    pictures = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]).view(3, 1, 1, 2)
    torch.testing.assert_close(loss(pictures), torch.tensor([0.5, 1 - math.sqrt(0.5), 1.5]))


def test_clips_pixels_are_cropped_normalized_and_keep_the_gradient():
    pictures = draws(1, 3, 20, 30).requires_grad_()
    pixels = clip_pixels(pictures, 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert pixels.shape == (1, 3, 10, 10)
    (gradient,) = torch.autograd.grad(pixels.sum(), pictures)
    assert gradient[..., 8:22].abs().min() > 0 and not gradient[..., 0].any() and not gradient[..., -1].any()
    plain = clip_pixels(torch.zeros(1, 3, 10, 10), 10, (0.5, 0.25, 0.0), (1.0, 1.0, 0.5))
    assert plain[0, :, 3, 3].tolist() == [0.0, 0.25, 1.0]


def test_a_face_is_cut_out_as_a_square():
    mask = torch.zeros(40, 60)
    mask[10:30, 20:30] = 1
    assert square_around(mask) == pytest.approx((15 / 60, 10 / 40, 35 / 60, 30 / 40))
    mask = torch.zeros(40, 60)
    mask[:, 50:] = 1  # a square of 40 does not fit in the middle of these, so it moves in from the edge
    assert square_around(mask) == pytest.approx((20 / 60, 0, 1, 1))
    pictures = torch.zeros(1, 3, 80, 120)
    pictures[..., 20:60, 30:70] = 1
    face = cut_out(pictures, (15 / 60, 10 / 40, 35 / 60, 30 / 40), 8)
    torch.testing.assert_close(face, torch.ones(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="paint the place of the face white"):
        square_around(torch.zeros(4, 4))
