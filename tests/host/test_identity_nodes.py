"""The identity nodes in the host: what they make of pictures, keep in files, and refuse."""

import copy
import gc
import json
import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("tiny/lookahead.py")


@pytest.fixture
def nodes(comfy, monkeypatch):
    from comfyui_personalize.nodes import identity

    # What the host's executor gives.
    given = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}})
    monkeypatch.setattr(identity.SaveIdentity, "hidden", given)
    return identity


@pytest.fixture
def folder(comfy, nodes):
    """folder(kind) -> the first of the host's folders for it."""
    from pathlib import Path

    def first(kind):
        path = Path(comfy.folder_paths.get_folder_paths(kind)[0])
        path.mkdir(parents=True, exist_ok=True)
        return path

    return first


@pytest.fixture
def person(comfy, nodes, tiny, folder):
    """An encoder for the tiny SDXL model, its CLIP-Vision and VAE, and encode(image, ...) -> identity."""
    vision = folder("clip_vision") / "tiny_vision.safetensors"
    if not vision.exists():
        tiny.write_clip_vision(vision)
    (clip_vision,) = comfy.nodes.CLIPVisionLoader().load_clip(vision.name)
    encoder, vae = tiny.make_encoder("sdxl"), comfy.load("sdxl")[2]

    def encode(image, pictures="average", side=64, *, vae=vae, clip_vision=clip_vision, encoder=encoder):
        return nodes.EncodeIdentity.execute(encoder, clip_vision, image, pictures, side, vae).args[0]

    return SimpleNamespace(encode=encode, encoder=encoder, vae=vae, clip_vision=clip_vision)


def pictures(count=1, height=64, width=64, seed=0):
    """Smooth colours in 0..1, (count, height, width, 3)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1).contiguous()


def tensors_of(identity):
    from comfyui_personalize.models.lookahead.identity import identity_tensors

    return identity_tensors(identity)


def same(one, two):
    first, second = tensors_of(one), tensors_of(two)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_an_identity_of_one_picture(comfy, person):
    image = pictures()
    identity = person.encode(image)
    assert identity.tokens.cond.shape == identity.tokens.uncond.shape == (1, 4, 192)
    assert identity.tokens.cond.dtype == identity.latents.dtype == torch.float32
    assert identity.latents.equal(comfy.nodes.VAEEncode().encode(person.vae, image)[0]["samples"][None])
    identity.check_made_by(person.encoder.resampler, "the encoder")
    assert same(identity, person.encode(image))


def test_tokens_come_from_the_last_layer_but_one(comfy, person):
    image = pictures(2, 80, 64)
    hidden = comfy.nodes.CLIPVisionEncode().encode(person.clip_vision, image, "center")[0].penultimate_hidden_states
    identity = person.encode(image, "one person each", vae=None)
    torch.testing.assert_close(identity.tokens.cond, person.encoder.resampler(hidden), rtol=1e-4, atol=1e-4)
    model = person.clip_vision.model
    _, nobody, *_ = model(pixel_values=torch.zeros(1, 3, 64, 64), intermediate_output=-2)
    expected = person.encoder.resampler(nobody).expand(2, -1, -1)
    torch.testing.assert_close(identity.tokens.uncond, expected, rtol=1e-4, atol=1e-4)


def test_a_person_each_is_each_person_alone(person):
    image = pictures(3)
    together = person.encode(image, "one person each")
    assert together.people == 3
    for index in range(3):
        alone = person.encode(image[index : index + 1])
        for got, expected in zip(tensors_of(together).values(), tensors_of(alone).values(), strict=True):
            torch.testing.assert_close(got[index : index + 1], expected, rtol=1e-4, atol=1e-4)
    assert (together.tokens.cond[0] - together.tokens.cond[1]).abs().mean() > 0.1


def test_the_same_picture_twice_is_that_picture(person):
    image = pictures()
    once, twice = person.encode(image), person.encode(image.repeat(2, 1, 1, 1))
    for name in ("cond", "uncond"):
        torch.testing.assert_close(getattr(twice.tokens, name), getattr(once.tokens, name), rtol=1e-4, atol=1e-5)
    assert twice.latents.shape == (1, 2, *once.latents.shape[2:])
    torch.testing.assert_close(twice.latents, once.latents.expand_as(twice.latents), rtol=1e-4, atol=1e-5)


def test_pictures_of_one_person_joined(person):
    image = pictures(3)
    each, average, concat = (person.encode(image, how) for how in ("one person each", "average", "concat"))
    torch.testing.assert_close(average.tokens.cond, each.tokens.cond.mean(0, keepdim=True))
    assert concat.tokens.cond.equal(each.tokens.cond.flatten(0, 1)[None])
    assert average.people == concat.people == 1
    assert average.latents.equal(each.latents.transpose(0, 1)) and concat.latents.equal(average.latents)


@pytest.mark.parametrize(
    ("height", "width", "side", "latent"),
    [(64, 64, 64, (8, 8)), (300, 200, 192, (32, 16)), (40, 40, 128, (16, 16)), (33, 1000, 64, (8, 16))],
)
def test_the_reference_keeps_area_and_proportions(person, height, width, side, latent):
    identity = person.encode(pictures(1, height, width), side=side)
    assert identity.latents.shape == (1, 1, 4, *latent)
    assert identity.tokens.cond.shape == (1, 4, 192)


def test_without_a_vae_there_are_no_latents(person):
    identity = person.encode(pictures(), vae=None)
    assert identity.latents is None
    assert identity.tokens.cond.equal(person.encode(pictures()).tokens.cond)


def test_grey_and_transparent_pictures(person):
    image = pictures()
    opaque = person.encode(image)
    see_through = torch.cat([image, torch.rand(1, 64, 64, 1)], dim=-1)
    assert same(person.encode(see_through), opaque)
    grey = image[..., :1]
    assert same(person.encode(grey), person.encode(grey.expand(-1, -1, -1, 3)))
    assert same(person.encode(torch.cat([grey, torch.rand(1, 64, 64, 1)], dim=-1)), person.encode(grey))
    assert same(person.encode(image.double()), opaque)


def test_a_line_of_pixels_takes_little_memory(person):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    person.encode(pictures(1, 1, 200_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_pictures_that_are_none(person):
    from comfyui_personalize.models.errors import ConfigError

    for image in (torch.zeros(0, 64, 64, 3), torch.zeros(64, 64, 3), torch.zeros(1, 0, 64, 3)):
        with pytest.raises(ConfigError, match="expected at least one picture"):
            person.encode(image)
    with pytest.raises(ConfigError, match="values that are no numbers"):
        person.encode(torch.full((1, 64, 64, 3), float("nan")))


def test_another_image_encoder_is_refused(person):
    from comfyui_personalize.models.errors import IncompatibleModelError

    def refused(*parts, **given):
        with pytest.raises(IncompatibleModelError) as error:
            person.encode(pictures(), **given)
        for part in ("needs a CLIP-Vision model that is", "load another file with Load CLIP Vision", *parts):
            assert part in str(error.value)

    vision = copy.copy(person.clip_vision)
    vision.model = torch.nn.Module()
    refused("sdxl_encoder", "the one connected is no CLIP", clip_vision=vision)
    vision.model.vision_model = torch.nn.Module()
    vision.model.vision_model.post_layernorm = torch.nn.LayerNorm(1024)
    refused("that is 64 wide", "connected is ViT-L/14 (1024 wide)", clip_vision=vision)
    encoder = copy.deepcopy(person.encoder)
    encoder.resampler.proj_in = torch.nn.Linear(1280, 64)
    refused("that is ViT-H/14 (1280 wide)", "connected is 64 wide", encoder=encoder)


def test_another_vae_is_refused(person):
    from comfyui_personalize.models.errors import IncompatibleModelError

    for channels, axes in ((16, 2), (16, 3), (4, 3)):
        vae = copy.copy(person.vae)
        vae.latent_channels, vae.latent_dim = channels, axes
        with pytest.raises(IncompatibleModelError, match="connect the VAE of the SDXL checkpoint"):
            person.encode(pictures(), vae=vae)


def test_a_vae_that_overflows_is_named(person, monkeypatch):
    from comfyui_personalize.models.errors import IncompatibleModelError

    monkeypatch.setattr(person.vae, "encode", lambda image: torch.full((1, 4, 8, 8), float("nan")))
    with pytest.raises(IncompatibleModelError, match="--fp32-vae"):
        person.encode(pictures())


def test_an_identity_is_saved_and_loaded_bit_for_bit(nodes, person, folder):
    from comfyui_personalize.models.formats import read_header

    for how, vae in (("average", person.vae), ("concat", None), ("one person each", person.vae)):
        identity = person.encode(pictures(2), how, vae=vae)
        (name,) = nodes.SaveIdentity.execute(identity, " my face ", overwrite=True).args
        assert name == "my face.safetensors" and (folder("identities") / name).exists()
        (again,) = nodes.LoadIdentity.execute(name).args
        assert same(again, identity)
        again.check_made_by(person.encoder.resampler, "the encoder")
    about = read_header(folder("identities") / name).metadata
    assert json.loads(about["workflow"]) == {"nodes": []} and json.loads(about["prompt"]) == {"1": {}}


def test_a_saved_identity_is_replaced_only_when_told(nodes, person, folder):
    from comfyui_personalize.models.errors import ConfigError

    nodes.SaveIdentity.execute(person.encode(pictures()), "ann", overwrite=True)
    path = folder("identities") / "ann.safetensors"
    content, version = path.read_bytes(), nodes.LoadIdentity.fingerprint_inputs(path.name)
    other = person.encode(pictures(seed=1))
    with pytest.raises(ConfigError, match="ann.safetensors exists already in identities"):
        nodes.SaveIdentity.execute(other, "ann")
    assert path.read_bytes() == content and nodes.LoadIdentity.fingerprint_inputs(path.name) == version
    nodes.SaveIdentity.execute(other, "ann", overwrite=True)
    assert nodes.LoadIdentity.fingerprint_inputs(path.name) != version


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "/etc/passwd", "C:ann", "", "..", "con"])
def test_names_that_leave_the_folder(comfy, nodes, person, name):
    from comfyui_personalize.models.errors import ConfigError

    assert "give a plain name" in nodes.SaveIdentity.validate_inputs(name)
    before = sorted(comfy.base.rglob("*"))
    with pytest.raises(ConfigError, match="give a plain name"):
        nodes.SaveIdentity.execute(person.encode(pictures(), vae=None), name, overwrite=True)
    assert sorted(comfy.base.rglob("*")) == before


def test_identities_that_cannot_be_loaded(nodes, person, folder):
    from comfyui_personalize.models.errors import FormatError
    from comfyui_personalize.models.formats import read_header

    (name,) = nodes.SaveIdentity.execute(person.encode(pictures()), "good", overwrite=True).args
    path = folder("identities") / name
    tensors, metadata = load_file(path), read_header(path).metadata
    tensors["tokens.cond"][0, 0, 0] = float("nan")
    save_file(tensors, path.with_name("nan.safetensors"), metadata)
    path.with_name("cut.safetensors").write_bytes(path.read_bytes()[:-5])
    for stem, message in (("nan", "no numbers"), ("cut", "truncated"), ("absent", "not in the identities folder")):
        with pytest.raises(FormatError, match=f"{stem}.safetensors.*{message}"):
            nodes.LoadIdentity.execute(f"{stem}.safetensors")
    assert "there is no identity named 'absent'" in nodes.LoadIdentity.validate_inputs("absent")
    assert nodes.LoadIdentity.validate_inputs(name) is nodes.LoadIdentity.validate_inputs(None) is True


def test_encoders_of_every_kind_are_listed_and_loaded(comfy, nodes, tiny, folder, checkpoint, person):
    slim = tiny.write_slim(folder("lookahead_encoders") / "slim.safetensors", "sdxl")
    authors = tiny.write_authors_checkpoint(slim.with_name("model_ckpt.pt"), "sdxl", checkpoint("sdxl"))
    image = pictures(2)
    expected = person.encode(image)
    for path in (slim, authors):
        assert path.name in nodes.LoadLookaheadEncoder.define_schema().inputs[0].options
        assert nodes.LoadLookaheadEncoder.validate_inputs(path.name) is True
        (encoder,) = nodes.LoadLookaheadEncoder.execute(path.name).args
        assert encoder.trained and encoder.name == path.name
        found = person.encode(image, encoder=encoder)
        assert found.encoder == expected.encoder
        torch.testing.assert_close(found.tokens.cond, expected.tokens.cond, rtol=0, atol=0.02)
    version = nodes.LoadLookaheadEncoder.fingerprint_inputs(slim.name)
    tiny.write_slim(slim, "sdxl", seed=1)
    assert version and nodes.LoadLookaheadEncoder.fingerprint_inputs(slim.name) != version


def test_the_folder_of_ip_adapters_is_searched_where_there_is_one(comfy, nodes, tiny, folder, tmp_path, monkeypatch):
    tiny.write_slim(tmp_path / "elsewhere.safetensors", "sdxl", seed=2)
    assert nodes.LoadLookaheadEncoder.validate_inputs("elsewhere.safetensors") is not True
    kinds = comfy.folder_paths.folder_names_and_paths
    monkeypatch.setitem(kinds, "ipadapter", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(comfy.folder_paths, "filename_list_cache", {})
    assert nodes.LoadLookaheadEncoder.validate_inputs("elsewhere.safetensors") is True
    assert nodes.LoadLookaheadEncoder.fingerprint_inputs("elsewhere.safetensors")
    (encoder,) = nodes.LoadLookaheadEncoder.execute("elsewhere.safetensors").args
    assert encoder.name == "elsewhere.safetensors"


def test_an_encoder_that_went_away_or_is_damaged(nodes, folder):
    from comfyui_personalize.models.errors import FormatError

    with pytest.raises(FormatError, match="gone.safetensors is not in the lookahead_encoders folder any more"):
        nodes.LoadLookaheadEncoder.execute("gone.safetensors")
    (folder("lookahead_encoders") / "html.safetensors").write_bytes(b"<html>404</html>" * 99)
    with pytest.raises(FormatError, match="html.safetensors"):
        nodes.LoadLookaheadEncoder.execute("html.safetensors")


def test_the_encoder_stays_where_and_as_it_is(person):
    before = {name: weight.clone() for name, weight in person.encoder.resampler.state_dict().items()}
    half = copy.deepcopy(person.encoder)
    half.resampler.half()
    identity = person.encode(pictures(), encoder=half)
    assert identity.tokens.cond.dtype == torch.float32 and half.resampler.latents.dtype == torch.float16
    person.encode(pictures())
    after = person.encoder.resampler.state_dict()
    assert all(after[name].equal(weight) for name, weight in before.items())


def test_nothing_grows_over_many_runs(nodes, person):
    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def run():
        identity = person.encode(pictures(2, 96, 80), "concat")
        nodes.LoadIdentity.execute(nodes.SaveIdentity.execute(identity, "again", overwrite=True).args[0])

    for _ in range(3):
        run()
    count, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        run()
    assert tensors() <= count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 * 1024  # KiB
