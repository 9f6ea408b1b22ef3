"""Properties of the resampler and of identities made with it."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.lookahead import Resampler, encode_identity, join_pictures

SIZES = {"picture_dim": 12, "output_dim": 20, "dim": 16, "tokens": 3, "depth": 2, "inner_dim": 24, "hidden_dim": 40}


@pytest.fixture
def resampler():
    torch.manual_seed(0)
    return Resampler(**SIZES, head_dim=8).requires_grad_(False)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sizes_are_read_from_the_tensors(resampler):
    tensors = {f"image_proj.{key}": value for key, value in resampler.state_dict().items()}
    again = Resampler.from_tensors(
        tensors | {"ip_adapter.1.to_k_ip.weight": draws(2, 2)}, prefix="image_proj.", head_dim=8
    )
    picture = draws(2, 5, 12)
    assert torch.equal(again(picture), resampler(picture))
    assert again(picture).shape == (2, 3, 20)


def test_names_are_those_of_the_published_files(resampler):
    names = {key for key in resampler.state_dict() if not key.startswith("layers.")}
    assert names == {
        "latents", "proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias",
        "norm_out.weight", "norm_out.bias",
    }  # fmt: skip
    layer = {key.removeprefix("layers.1.") for key in resampler.state_dict() if key.startswith("layers.1.")}
    assert layer == {
        "0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias",
        "0.to_q.weight", "0.to_kv.weight", "0.to_out.weight",
        "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight",
    }  # fmt: skip


def test_pictures_do_not_see_each_other(resampler):
    picture = draws(3, 5, 12)
    order = [2, 0, 1]
    torch.testing.assert_close(resampler(picture)[order], resampler(picture[order]))
    torch.testing.assert_close(resampler(picture)[:1], resampler(picture[:1]))


def test_the_order_of_the_patches_is_not_seen(resampler):
    picture = draws(1, 5, 12)
    torch.testing.assert_close(resampler(picture), resampler(picture[:, [4, 2, 0, 1, 3]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(resampler, dtype):
    picture = draws(2, 5, 12)
    half = Resampler.from_tensors({key: value.to(dtype) for key, value in resampler.state_dict().items()}, head_dim=8)
    tokens = half(picture.to(dtype))
    assert tokens.dtype == dtype
    torch.testing.assert_close(tokens.float(), resampler(picture), atol=0.1, rtol=0.05)


def test_gradients_reach_every_parameter():
    resampler = Resampler(**SIZES, head_dim=8)
    (resampler(draws(2, 5, 12)) * draws(2, 3, 20, seed=1)).sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in resampler.parameters())


def test_hidden_states_of_another_clip_vision_are_refused(resampler):
    with pytest.raises(IncompatibleModelError, match="shape .2, 5, 13.*wants .batch, patches, 12"):
        resampler(draws(2, 5, 13))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("latents"), "no IP-Adapter Plus resampler"),
        (lambda t: t.pop("layers.1.0.to_kv.weight"), "layers.1.0.to_kv.weight: no tensor of that name"),
        (lambda t: t.update({"proj_out.bias": draws(7)}), r"proj_out.bias: shape \(7,\).*has shape \(20,\)"),
        (lambda t: t.update({"layers.0.0.to_q.weight": draws(23, 16)}), "23 channels"),
        (lambda t: t.update({"to_latents.weight": draws(7)}), "to_latents.weight"),
        (lambda t: t.clear(), "these 0 tensors"),
    ],
)
def test_files_that_are_no_resampler_are_refused(resampler, change, said):
    tensors = dict(resampler.state_dict())
    change(tensors)
    with pytest.raises(FormatError, match=said):
        Resampler.from_tensors(tensors, head_dim=8)


def test_the_unconditional_twin_is_the_picture_of_zeros(resampler):
    calls = []

    def hidden_states(pixels):
        calls.append(len(pixels))
        return pixels.flatten(2).transpose(1, 2) + 1  # (batch, height * width, channels)

    pixels = draws(2, 12, 2, 2)
    identity = encode_identity(resampler, hidden_states, pixels)
    torch.testing.assert_close(identity.cond, resampler(hidden_states(pixels)))
    torch.testing.assert_close(identity.uncond, resampler(hidden_states(torch.zeros_like(pixels))))
    assert calls[0] == 3, "one pass for two pictures and nobody"
    assert identity.uncond.abs().max() > 0


def test_several_pictures_of_a_person():
    tokens = draws(3, 4, 6)
    torch.testing.assert_close(join_pictures(tokens, "average"), tokens.mean(0, keepdim=True))
    joined = join_pictures(tokens, "concat")
    assert joined.shape == (1, 12, 6) and torch.equal(joined[0, 4:8], tokens[1])
    for how in ("average", "concat"):
        assert torch.equal(join_pictures(tokens[:1], how), tokens[:1])
    with pytest.raises(ConfigError, match="'average' or 'concat', not by 'sum'"):
        join_pictures(tokens, "sum")
