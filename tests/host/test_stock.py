"""The tiny checkpoints go through the host's own loader, text encoders, sampler and autoencoder."""

import logging

import numpy as np
import pytest
import torch

FAMILIES = ("sd15", "sd21", "sdxl")
CONTEXT_WIDTH = {"sd15": 64, "sd21": 128, "sdxl": 64 + 128}
EXPECTED_MISSING = (".logit_scale", ".transformer.text_projection.weight")  # published files lack them as well


def text_to_image(family, *, seed=1, steps=2, prompt="a photo of a dog", prefix="stock"):
    """The stock text-to-image graph in API format; node "5" samples, node "7" saves."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"tiny_{family}.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": prompt}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 7.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": prefix}},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_image_over_http(client, family):
    run = client.run(text_to_image(family))
    assert run.status == "success", run.error
    (picture,) = client.images(run, node="7")
    pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (64, 64, 3)
    assert pixels.std() > 5  # of 255: not one colour
    assert run.progress("5")[-1] == (2, 2)
    assert run.previews


def test_the_prompt_and_the_seed_change_the_picture_and_nothing_else_does(client):
    def pixels(**changes):
        # A new file name makes the host save again where it would have used its cache.
        (picture,) = client.images(client.run(text_to_image("sdxl", **changes)))
        return np.asarray(picture)

    first = pixels(prefix="first")
    assert np.array_equal(first, pixels(prefix="again"))
    assert not np.array_equal(first, pixels(prompt="a castle"))
    assert not np.array_equal(first, pixels(seed=2))


def test_interrupting_a_run_stops_it(client):
    def stop_at_once(kind, data):
        if kind == "progress":
            client.interrupt()

    run = client.run(text_to_image("sd15", steps=2000, seed=3), on_event=stop_at_once)
    assert run.status == "interrupted"
    assert run.progress("5")[-1][0] < 2000
    assert client.run(text_to_image("sd15", seed=4)).status == "success"


def test_an_unknown_checkpoint_is_refused_before_it_is_queued(client, load_helper):
    graph = text_to_image("sd15")
    graph["1"]["inputs"]["ckpt_name"] = "absent.safetensors"
    with pytest.raises(load_helper("host/client.py").Rejected) as refusal:
        client.post(graph)
    assert any("absent.safetensors" in message for message in refusal.value.messages)


def test_an_uploaded_picture_can_be_loaded(client):
    from PIL import Image

    name = client.upload(Image.new("RGB", (24, 16), (200, 30, 30)), "red.png", subfolder="pictures")
    assert name == "pictures/red.png"
    run = client.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    (picture,) = client.images(run)
    assert picture.convert("RGB").getpixel((3, 3)) == (200, 30, 30)


@pytest.mark.parametrize("family", (*FAMILIES, "world_sd15", "world_sdxl"))
def test_the_host_finds_every_weight_that_it_expects(comfy, checkpoint, family, caplog):
    with caplog.at_level(logging.DEBUG):
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint(family)))
    complaints = [text for text in caplog.messages if "missing" in text.lower() or "unexpected" in text.lower()]
    unexplained = [text for text in complaints if not all(key.endswith(EXPECTED_MISSING) for key in _keys_in(text))]
    assert not unexplained
    left_over = [key for text in caplog.messages if text.startswith("left over keys") for key in _keys_in(text)]
    assert left_over in ([], ["v_pred"])

    assert type(model.model).__name__ == ("SDXL" if family.endswith("sdxl") else "BaseModel")
    assert model.model.model_type.name == ("V_PREDICTION" if family == "sd21" else "EPS")
    assert clip.tokenize("a dog") and vae.latent_channels == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("timestep", (0, 500, 999))
def test_predictions_have_the_scale_of_a_real_models(comfy, family, timestep):
    model, clip, _ = comfy.load(family)
    sampling = model.model.model_sampling
    sigma = sampling.sigma(torch.tensor([float(timestep)]))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 16, 16, generator=generator) * (1 + sigma**2).sqrt()
    predictions = []
    for prompt in ("a photo of a dog", "a castle by the sea"):
        (conditioning,) = comfy.nodes.CLIPTextEncode().encode(clip, prompt)
        context, pooled = conditioning[0][0], conditioning[0][1]["pooled_output"]
        assert context.shape == (1, 77, CONTEXT_WIDTH[family])
        vector = model.model.encode_adm(pooled_output=pooled, width=128, height=128) if family == "sdxl" else None
        unet = model.model.diffusion_model
        predictions.append(
            unet(sampling.calculate_input(sigma, noisy), torch.tensor([timestep]), context=context, y=vector)
        )
    assert all(0.3 < prediction.std() < 3 for prediction in predictions)
    assert (predictions[0] - predictions[1]).std() > 0.01  # the text is heard


@pytest.mark.parametrize("family", FAMILIES)
def test_the_autoencoder_keeps_a_pictures_colours(comfy, family):
    model, _, vae = comfy.load(family)
    ramp = torch.linspace(0.1, 0.9, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, 1 - ramp.expand(64, 64)], dim=-1)[None]
    latent = vae.encode(picture)
    assert latent.shape == (1, 4, 8, 8)
    scaled = model.model.latent_format.process_in(latent)
    assert 0.3 < scaled.std() < 2  # real scaled latents are near 1
    assert (vae.decode(latent) - picture).abs().mean() < 0.1


def _keys_in(message):
    """The quoted names in a log line such as "clip missing: ['a', 'b']"."""
    return message.split("'")[1::2]
