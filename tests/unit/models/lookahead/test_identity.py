"""Identities: gathered from pictures, kept in files bit for bit, and told apart by the encoder that made them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.formats import FORMAT_KEY, read_header, write_safetensors
from comfyui_personalize.models.lookahead import IdentityTokens, Resampler
from comfyui_personalize.models.lookahead.identity import (
    ENCODER_KEY,
    FORMAT,
    Identity,
    fingerprint,
    fit_reference,
    gather_identity,
    identity_tensors,
    read_identity,
    reference_sides,
    write_identity,
)

SIZES = {"picture_dim": 12, "output_dim": 20, "dim": 16, "tokens": 3, "depth": 2, "inner_dim": 64, "hidden_dim": 40}


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(pictures, seed=0):
    return IdentityTokens(draws(pictures, 3, 20, seed=seed), draws(1, 3, 20, seed=seed + 1).expand(pictures, -1, -1))


def resampler(seed=0):
    torch.manual_seed(seed)
    return Resampler(**SIZES).requires_grad_(False)


def made(how="average", pictures=2, latents=True):
    return gather_identity(tokens_of(pictures), draws(pictures, 4, 6, 8) if latents else None, how, "abc")


def same(one, two):
    first, second = identity_tensors(one), identity_tensors(two)
    assert first.keys() == second.keys() and one.encoder == two.encoder
    return all(first[name].equal(second[name]) for name in first)


def test_one_picture_is_the_same_however_it_is_joined():
    assert same(made("average", 1), made("concat", 1)) and same(made("average", 1), made("one person each", 1))


def test_a_picture_twice_is_that_picture_on_average():
    once = tokens_of(1)
    twice = IdentityTokens(once.cond.expand(2, -1, -1), once.uncond.expand(2, -1, -1))
    assert same(gather_identity(twice, None, "average", "abc"), gather_identity(once, None, "average", "abc"))


def test_pictures_of_one_person():
    tokens, latents = tokens_of(3), draws(3, 4, 6, 8)
    average = gather_identity(tokens, latents, "average", "abc")
    torch.testing.assert_close(average.tokens.cond[0], tokens.cond.mean(0))
    concat = gather_identity(tokens, latents, "concat", "abc")
    assert concat.tokens.cond.equal(torch.cat(list(tokens.cond))[None])
    assert concat.tokens.uncond.shape == concat.tokens.cond.shape == (1, 9, 20)
    for identity in (average, concat):
        assert identity.people == 1 and identity.latents.equal(latents[None])


def test_a_person_each():
    tokens, latents = tokens_of(3), draws(3, 4, 6, 8)
    identity = gather_identity(tokens, latents, "one person each", "abc")
    assert identity.people == 3 and identity.latents.shape == (3, 1, 4, 6, 8)
    for person in range(3):
        alone = IdentityTokens(tokens.cond[person : person + 1], tokens.uncond[person : person + 1])
        one = gather_identity(alone, latents[person : person + 1], "average", "abc")
        assert identity.tokens.cond[person].equal(one.tokens.cond[0])
        assert identity.latents[person].equal(one.latents[0])


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="'average' or 'concat', not by 'sum'"):
        gather_identity(tokens_of(2), None, "sum", "abc")


def test_a_fingerprint_tells_weights_apart_and_not_dtypes():
    one, other = resampler(), resampler(1)
    assert fingerprint(one) == fingerprint(resampler()) == fingerprint(resampler().half())
    assert fingerprint(one) != fingerprint(other)
    name = fingerprint(one)
    one.layers[1][0].to_kv.weight[-1, 0] += 1
    assert fingerprint(one) != name
    assert len(name) == 16 and int(name, 16)


def test_large_weights_change_the_fingerprint_too():
    torch.manual_seed(0)
    wide = Resampler(**SIZES | {"dim": 320, "hidden_dim": 640}).requires_grad_(False)
    name = fingerprint(wide)
    wide.layers[0][1][1].weight *= 1.01
    assert fingerprint(wide) != name


def test_an_identity_knows_its_encoder():
    encoder = resampler()
    identity = gather_identity(tokens_of(1), None, "average", fingerprint(encoder))
    identity.check_made_by(encoder, "mine.safetensors")
    with pytest.raises(IncompatibleModelError, match="another encoder than other.safetensors; encode the pictures"):
        identity.check_made_by(resampler(1), "other.safetensors")


@pytest.mark.parametrize("how", ["average", "concat", "one person each"])
@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_keeps_every_bit(tmp_path, how, latents, dtype):
    identity = made(how, 3, latents)
    tokens = IdentityTokens(identity.tokens.cond.to(dtype), identity.tokens.uncond.to(dtype))
    identity = Identity(tokens, identity.latents, identity.encoder)
    path = write_identity(tmp_path / "ann.safetensors", identity, {"prompt": "{}"})
    again = read_identity(path)
    assert same(again, identity) and again.tokens.cond.dtype == dtype
    assert read_header(path).metadata == {FORMAT_KEY: FORMAT, ENCODER_KEY: "abc", "prompt": "{}"}


def test_a_file_is_not_overwritten_unless_told(tmp_path):
    path = write_identity(tmp_path / "ann.safetensors", made(), {})
    before = path.read_bytes()
    other = made("concat")
    with pytest.raises(ConfigError, match="ann.safetensors exists already"):
        write_identity(path, other, {})
    assert path.read_bytes() == before
    write_identity(path, other, {}, overwrite=True)
    assert same(read_identity(path), other) and list(tmp_path.iterdir()) == [path]


def broken(change):
    tensors = {name: tensor.clone().contiguous() for name, tensor in identity_tensors(made()).items()}
    change(tensors)
    return tensors


BROKEN = {
    "nan": (lambda t: t["latents"].view(-1)[5:6].fill_(float("nan")), "latents has values that are no numbers"),
    "infinite": (lambda t: t["tokens.uncond"].view(-1)[:1].fill_(torch.inf), "tokens.uncond has values"),
    "missing": (lambda t: t.pop("tokens.uncond"), "found latents, tokens.cond, expected"),
    "unknown": (lambda t: t.update(more=torch.zeros(1)), "found latents, more, tokens.cond"),
    "axes": (lambda t: t.update({"tokens.cond": torch.zeros(3, 20)}), r"tokens.cond is \(3, 20\)"),
    "empty": (lambda t: t.update({"latents": torch.zeros(1, 0, 4, 6, 8)}), r"latents is \(1, 0, 4, 6, 8\)"),
    "whole numbers": (lambda t: t.update({"latents": torch.zeros(1, 1, 4, 6, 8).long()}), "of int64"),
    "tokens": (lambda t: t.update({"tokens.uncond": torch.zeros(1, 4, 20)}), "as many people and tokens"),
    "people": (lambda t: t.update({"latents": torch.zeros(2, 1, 4, 6, 8)}), "as many people and tokens"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_file_is_refused(tmp_path, kind):
    change, message = BROKEN[kind]
    path = tmp_path / "bad.safetensors"
    write_safetensors(path, broken(change), {FORMAT_KEY: FORMAT, ENCODER_KEY: "abc"})
    with pytest.raises(FormatError, match=f"bad.safetensors: .*{message}.*save the identity again"):
        read_identity(path)


def test_other_files_are_refused_before_their_tensors_are_read(tmp_path):
    path = write_identity(tmp_path / "ann.safetensors", made(), {})
    save_file(load_file(path), tmp_path / "plain.safetensors")
    write_safetensors(tmp_path / "encoder.safetensors", load_file(path), {FORMAT_KEY: "lookahead-encoder/1"})
    write_safetensors(tmp_path / "nobody.safetensors", load_file(path), {FORMAT_KEY: FORMAT})
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-10])
    for name, message in (
        ("plain", "expected format 'lookahead-identity/1', found 'a file of something else'"),
        ("encoder", "found 'lookahead-encoder/1'; choose a file that Save Identity made"),
        ("nobody", "the fingerprint of their encoder"),
        ("cut", "truncated"),
        ("absent", "could not be read"),
    ):
        with pytest.raises(FormatError, match=f"{name}.safetensors: .*{message}"):
            read_identity(tmp_path / f"{name}.safetensors")


def test_sides_keep_area_and_proportions():
    assert reference_sides(512, 512, 1024, 64) == (1024, 1024)
    assert reference_sides(1024, 1024, 1000, 64) == (1024, 1024)  # 15.6 times 64
    assert reference_sides(1500, 1000, 1024, 64) == (1280, 832)  # 1254 x 836
    assert reference_sides(1000, 1500, 1024, 64) == (832, 1280)
    assert reference_sides(1, 100_000, 1024, 64) == (512, 2048)
    assert reference_sides(10, 10, 1, 64) == (64, 64)


def test_a_picture_of_the_right_size_stays_as_it_is():
    pictures = draws(2, 3, 64, 128).sigmoid()
    assert fit_reference(pictures, 90, 64).equal(pictures)


def test_the_middle_is_kept_undistorted():
    # A disc stays a disc, in the middle: its extents in both directions are those of the scaled one.
    height, width, radius = 150, 200, 40
    y, x = torch.meshgrid(torch.arange(height) - 74.5, torch.arange(width) - 99.5, indexing="ij")
    disc = (x**2 + y**2 <= radius**2).float()[None, None]
    for multiple in (8, 64):
        fitted = fit_reference(disc, 128, multiple)
        assert fitted.shape[-2:] == reference_sides(height, width, 128, multiple)
        assert 0 <= fitted.min() and fitted.max() <= 1
        rows, columns = (fitted[0, 0].amax(axis) > 0.5 for axis in (1, 0))
        assert abs(int(rows.sum()) - int(columns.sum())) <= 1
        for inside in (rows, columns):
            where = inside.nonzero()
            assert abs((int(where[0]) + int(where[-1])) - (len(inside) - 1)) <= 1


def test_a_very_long_picture_loses_its_ends():
    long = torch.zeros(1, 1, 10, 100_000)  # scaled as a whole it would take gigabytes
    long[..., 49_980:50_020] = 1
    fitted = fit_reference(long, 128, 64)
    assert fitted.shape[-2:] == (64, 256) and fitted.mean() > 0.99
