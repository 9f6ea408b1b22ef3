"""The nodes that say what previews should come closer to."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def clip_vision(comfy, load_helper):
    """A CLIP Vision encoder of random weights: the host's class at the tiny size."""
    import comfy.clip_vision

    sizes = Path(__file__).resolve().parents[1] / "tiny" / "clip_vision.json"
    encoder = comfy.clip_vision.ClipVisionModel(str(sizes))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(encoder.model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        if "norm" in name or name.endswith("bias"):
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    return encoder


@pytest.fixture
def face_file(comfy):
    """A face network of random weights in the user's folder."""
    from comfyui_personalize.models.lookahead.arcface import ArcFace
    from comfyui_personalize.nodes._folders import FACE_NETWORKS

    folder = Path(comfy.folder_paths.get_folder_paths(FACE_NETWORKS)[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_ir_se50.pth"
    torch.manual_seed(0)
    units = [(8, 8, 1, 2, False), (8, 12, 1, 2, True), (12, 12, 1, 1, False)]
    torch.save(ArcFace(units, 16, 4).state_dict(), path)
    yield path
    path.unlink()


def pictures(count=1, height=64, width=64, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def guidance(comfy, tools, family, losses, **settings):
    """A loss's value on the picture without and with guidance."""
    from comfyui_personalize.nodes.preview_guidance import LookaheadPreviewGuidance

    model, clip, vae = comfy.load(family)
    guider = comfy.samplers.CFGGuider(model)
    positive, negative = (comfy.nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a red ring", ""))
    guider.set_conds(positive, negative)
    guided = LookaheadPreviewGuidance.execute(guider, losses, "none", 1.0, 0.0, 0.9, "through the model", vae).args[0]
    values = []
    for each in (guider, guided):
        latents = tools.guide(each, steps=4)
        values.append(losses[0].loss(vae.decode(latents).movedim(-1, 1) * 2 - 1).item())
    return values


def test_clip_sees_what_the_host_sees(comfy, clip_vision):
    """All but the rounding to 8 bits, which this picture has behind it."""
    from comfyui_personalize.nodes.clip_embeddings import embed_pictures

    image = (pictures(2) * 255).round() / 255
    expected = clip_vision.encode_image(image)["image_embeds"]
    torch.testing.assert_close(
        embed_pictures(clip_vision, image.movedim(-1, 1) * 2 - 1), expected.float(), rtol=1e-3, atol=1e-3
    )


def test_guidance_towards_what_clip_sees_in_a_picture(comfy, tools, clip_vision):
    from comfyui_personalize.nodes.preview_losses import ClipLossNode

    losses = ClipLossNode.execute(clip_vision, "", 1.0, image=pictures(2)).args[0]
    before, after = guidance(comfy, tools, "world_sdxl", losses)
    assert after < before - 0.005
    assert not any(
        parameter.requires_grad and parameter.grad is not None for parameter in clip_vision.model.parameters()
    )


def test_guidance_towards_a_face(comfy, tools, face_file):
    from comfyui_personalize.nodes.preview_losses import IdentityLossNode

    mask = torch.zeros(1, 64, 64)
    mask[:, 8:48, 16:56] = 1
    losses = IdentityLossNode.execute(face_file.name, pictures(2, 80, 70), 1.0, mask=mask).args[0]
    before, after = guidance(comfy, tools, "sd15", losses)
    assert after < before - 0.005


def test_face_networks_that_are_none_are_refused(comfy, face_file):
    from comfyui_personalize.models.errors import ConfigError, FormatError
    from comfyui_personalize.nodes.preview_losses import IdentityLossNode

    with pytest.raises(ConfigError, match="paint the place of the face white"):
        IdentityLossNode.execute(face_file.name, pictures(), 1.0, mask=torch.zeros(1, 64, 64))
    torch.save({"weight": torch.zeros(3)}, face_file)
    with pytest.raises(FormatError, match="is no IR-SE50 face network"):
        IdentityLossNode.execute(face_file.name, pictures(), 1.0)


def test_losses_are_chained_and_those_of_weight_zero_left_out(comfy, clip_vision):
    from comfyui_personalize.nodes.preview_losses import ClipLossNode, PictureLossNode

    first = PictureLossNode.execute(pictures(), "mean absolute", 2.0).args[0]
    both = ClipLossNode.execute(clip_vision, "", 0.5, image=pictures(), losses=first).args[0]
    assert [each.weight for each in both] == [2.0, 0.5] and both[0] is first[0]
    assert both[1].networks == (clip_vision.patcher,)
    assert PictureLossNode.execute(pictures(), "mean absolute", 0.0, losses=both).args[0] == both
    assert PictureLossNode.execute(pictures(), "mean absolute", 0.0).args[0] == ()


def test_words_need_an_encoder_that_shares_a_space_with_pictures(comfy, clip_vision):
    from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError
    from comfyui_personalize.nodes.clip_embeddings import text_target
    from comfyui_personalize.nodes.preview_losses import ClipLossNode

    def text_loss(clip):
        return ClipLossNode.execute(clip_vision, "a red ring", 1.0, clip=clip)

    with pytest.raises(ConfigError, match="connect clip, or leave the text empty"):
        text_loss(None)
    with pytest.raises(ConfigError, match="there is nothing to compare with"):
        ClipLossNode.execute(clip_vision, " ", 1.0)
    with pytest.raises(IncompatibleModelError, match="saved without its projection"):
        text_loss(comfy.load("sd15")[1])
    clip = comfy.load("sdxl")[1]
    target = text_target(clip, "a red ring")
    width = clip.cond_stage_model.clip_g.transformer.text_projection.weight.shape[0]
    assert target.shape == (1, width)
    assert not torch.equal(target, text_target(clip, "a blue star"))
    with pytest.raises(IncompatibleModelError, match=f"words by {width} numbers and this CLIP Vision pictures by 64"):
        text_loss(clip)


def test_words_and_pictures_count_half_each(comfy, clip_vision, monkeypatch):
    from comfyui_personalize.nodes import preview_losses

    words = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(preview_losses, "text_target", lambda clip, text: words)
    image = pictures()
    with_words, with_picture, both = (
        preview_losses.ClipLossNode.execute(clip_vision, text, 1.0, image=target).args[0][0].loss
        for text, target in (("a ring", None), ("", image), ("a ring", image))
    )
    seen = pictures(3, seed=5).movedim(-1, 1) * 2 - 1
    torch.testing.assert_close(both(seen), (with_words(seen) + with_picture(seen)) / 2)
    torch.testing.assert_close(with_picture(image.movedim(-1, 1) * 2 - 1), torch.zeros(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_is_no_picture(comfy, count):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.preview_losses import PictureLossNode

    with pytest.raises(ConfigError, match=f"found a batch of {count}"):
        PictureLossNode.execute(pictures(count), "mean squared", 1.0)
    if count:
        with pytest.raises(ConfigError, match="one mask is expected, found 2"):
            PictureLossNode.execute(pictures(), "mean squared", 1.0, mask=torch.ones(2, 8, 8))
