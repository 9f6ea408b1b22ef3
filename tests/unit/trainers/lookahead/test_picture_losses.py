"""The losses on the previewed picture that need further models."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comfyui_personalize.models.errors import FormatError, MissingDependencyError
from comfyui_personalize.trainers.lookahead.config import LookaheadConfig, PictureTerm
from comfyui_personalize.trainers.lookahead.losses import Seen, make_losses

CPU = torch.device("cpu")


def make(name, models, finder=lambda picture: None):
    config = LookaheadConfig(picture_losses=(PictureTerm(name=name, weight=2.0),))
    weight, loss = make_losses(config, models, finder, CPU)[name]
    assert weight == 2.0
    return loss


def seen(side=32, **told):
    generator = torch.Generator().manual_seed(0)
    pictures, references = torch.rand(2, 2, 3, side, side, generator=generator) * 2 - 1
    return Seen(pictures.requires_grad_(), references, told.get("landmarks", [None] * 2), ["a face", "a painting"])


def test_the_pictures_themselves(models):
    given = seen()
    loss = make("image_l1", models)(given)
    loss.backward()
    assert loss.item() == pytest.approx((given.pictures - given.references).abs().mean().item())
    assert given.pictures.grad.abs().min() > 0


def test_identity_is_zero_for_the_same_face(models):
    points = torch.tensor([[12.0, 13], [20, 13], [16, 18], [13, 22], [19, 22]])
    given = seen(landmarks=[points, None])
    loss = make("identity", models, finder=lambda picture: points)
    same = loss(replace(given, references=given.pictures.detach()))
    other = loss(given)
    assert same.item() == pytest.approx(0, abs=1e-5) and other.item() > 1e-3
    (gradient,) = torch.autograd.grad(other, given.pictures)
    assert gradient[0].any() and not gradient[1].any()  # the second reference shows no face


def test_clip_compares_with_the_prompts(models, tmp_path, tiny):
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = text | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="with a tokenizer"):
        make("clip", replace(models, clip=tmp_path / "none"))
    tiny.base().tokenizer().save_pretrained(tmp_path)
    loss, given = make("clip", replace(models, clip=tmp_path)), seen()
    value = loss(given)
    (gradient,) = torch.autograd.grad(value, given.pictures)
    assert 0 < value.item() < 2 and gradient.flatten(1).norm(dim=1).min() > 0
    assert loss(replace(given, prompts=["a dog", "a cat"])).item() != value.item()


@pytest.mark.parametrize("name", ["lpips", "dreamsim"])
def test_optional_packages_are_named_where_they_lack(name, models, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"needs the package {name}"):
        make(name, replace(models, vgg=tmp_path, dreamsim=tmp_path))


def test_dreamsim_never_downloads(models, monkeypatch, tmp_path):
    made, own = [], torch.hub.download_url_to_file

    def dreamsim(pretrained, device, cache_dir):
        if not (Path(cache_dir) / "dino_vitb16_pretrain.pth").exists():
            torch.hub.download_url_to_file("https://example.com/pretrained.zip", "pretrained.zip")
        made.append(cache_dir)
        network = torch.nn.Module()
        network.forward = lambda first, second: (first - second).abs().flatten(1).mean(1)
        return network, None

    monkeypatch.setitem(sys.modules, "dreamsim", SimpleNamespace(dreamsim=dreamsim))
    here = replace(models, dreamsim=tmp_path)
    with pytest.raises(FormatError, match="files are missing; give the folder of the unpacked"):
        make("dreamsim", here)
    assert made == [] and torch.hub.download_url_to_file is own
    (tmp_path / "dino_vitb16_pretrain.pth").touch()
    value = make("dreamsim", here)(seen())
    assert made == [str(tmp_path)] and 0 < value.item() < 1  # of pictures in 0..1
