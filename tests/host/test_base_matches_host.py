"""The same checkpoint in the host and in the trainers: same ids, text encodings, latents, pictures and predictions."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.text import PromptEncoder
from comfyui_personalize.trainers.tokenizer import load_tokenizer

FAMILIES = ("sd15", "sd21", "sdxl")
CHECKPOINTS = (*FAMILIES, "world_sd15", "world_sdxl")
PROMPTS = [
    "a photo of a dog playing saxophone, sticker style",
    "",
    "it's 7 o'clock -- naïve Ünïcödé & 日本語 🐶!",
    "one two three four five six seven eight nine ten " * 5,
]


def assert_close(actual, expected, relative=1e-4):
    """Largest difference, relative to the largest value: single values near zero carry no meaning."""
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < relative, f"largest difference is {error:.2e} of the largest value"


@pytest.fixture(params=CHECKPOINTS)
def pair(request, comfy, checkpoint):
    """Our base, and the host's (model, clip, vae), of one checkpoint."""
    return open_base(checkpoint(request.param)), comfy.load(request.param)


@pytest.mark.parametrize("from_folder", [True, False], ids=["host's tokenizer", "merges file"])
def test_token_ids(comfyui, pair, from_folder):
    base, (_, clip, _) = pair
    tokenizer = load_tokenizer(comfyui / "comfy" / "sd1_tokenizer" if from_folder else None)
    encoder = PromptEncoder(base.family, base.load_text_encoders(), tokenizer)
    for prompt in PROMPTS:
        tokens = clip.tokenize(prompt)
        for slot in base.family.encoders:
            (window,) = tokens[slot.key.removeprefix("clip_")]
            assert encoder.token_ids(prompt, slot) == [token for token, _ in window]


def test_text_encodings(pair):
    base, (_, clip, _) = pair
    ours = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer()).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        embeds, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        assert_close(ours.embeds[row], embeds[0])
        if base.family.size_conditioning:
            assert_close(ours.pooled[row], pooled[0])


def test_latents_and_pictures(pair):
    base, (model, _, vae) = pair
    autoencoder = base.load_vae()
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    latents = model.model.process_latent_in(vae.encode(pictures))
    mean, std = autoencoder.encode_moments(pictures.movedim(-1, 1) * 2 - 1)
    assert_close(mean, latents)
    assert torch.equal(std, torch.zeros_like(mean))
    decoded = vae.decode(model.model.process_latent_out(latents))
    assert_close((autoencoder.decode(latents).movedim(1, -1) + 1) / 2, decoded)


def test_unet_prediction(comfy, pair):
    base, (patcher, _, _) = pair
    generator = torch.Generator().manual_seed(2)
    unet = base.load_unet()
    comfy.model_management.load_model_gpu(patcher)
    inner = patcher.model.diffusion_model.to(torch.float32)
    noisy = torch.randn(2, 4, 16, 24, generator=generator)
    timesteps = torch.tensor([999, 37])
    context = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    vector, added = None, None
    if base.family.size_conditioning:
        pooled = torch.randn(2, base.text_encoders[-1].config["projection_dim"], generator=generator)
        sizes = {"height": 700, "width": 900, "crop_h": 8, "crop_w": 16, "target_height": 512, "target_width": 768}
        vector = torch.cat([patcher.model.encode_adm(pooled_output=pooled[i : i + 1], **sizes) for i in range(2)])
        time_ids = torch.tensor([list(sizes.values())] * 2, dtype=torch.float32)
        added = {"text_embeds": pooled, "time_ids": time_ids}
    expected = inner(noisy, timesteps, context=context, y=vector)
    actual = unet(noisy, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]
    assert_close(actual, expected)


def test_noise_schedule_and_prediction_type(pair):
    base, (patcher, _, _) = pair
    sampling = patcher.model.model_sampling
    alphas = base.noise_schedule().alphas_cumprod
    assert_close(((1 - alphas) / alphas).sqrt(), sampling.sigmas)
    noisy, output, sigma = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), sampling.sigmas[300:301]
    scaled = noisy / (sigma**2 + 1) ** 0.5  # the trainers' noisy latents have unit variance
    alpha = alphas[300]
    if base.prediction_type == "epsilon":
        clean = (scaled - (1 - alpha).sqrt() * output) / alpha.sqrt()
    else:
        clean = alpha.sqrt() * scaled - (1 - alpha).sqrt() * output
    assert_close(clean, sampling.calculate_denoised(sigma, output, noisy))


@pytest.mark.slow  # 84 million parameters: the host knows its KL autoencoder in one size only
@pytest.mark.parametrize("quantized", [True, False], ids=["quant_conv", "no quant_conv"])
def test_separate_kl_autoencoder(comfy, tiny_checkpoint, tmp_path, quantized):
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    sizes |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in AutoencoderKL(ddconfig=sizes, embed_dim=4).state_dict().items()
        }
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.6 / shape[1:].numel() ** 0.5 if len(shape) > 1 else 0.1)
        for name, shape in shapes.items()
        if quantized or "quant_conv" not in name
    }
    path = tmp_path / "vae.safetensors"
    save_file(weights, path)
    theirs = comfy.sd.VAE(sd=dict(weights)).first_stage_model.float()
    ours = open_base(tiny_checkpoint("sd15"), vae=path).load_vae()
    pictures = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    moments = theirs.encoder(pictures)
    mean, logvar = (theirs.quant_conv(moments) if quantized else moments).chunk(2, dim=1)
    our_mean, our_std = ours.encode_moments(pictures)
    assert_close(our_mean, mean * 0.18215)
    assert_close(our_std, (logvar.clamp(-30, 20) / 2).exp() * 0.18215)
    assert_close(ours.decode(our_mean), theirs.decode(mean).clamp(-1, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_names_are_the_hosts(comfy, load_helper, monkeypatch, family):
    """The host recognises the names and shapes that the loader is tested with, and its modules have the same ones."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.model_detection
    import comfy.ops

    full_size = load_helper("tiny/full_size.py")
    shapes = full_size.published_shapes(load_helper("tiny/checkpoints.py"), monkeypatch, family)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(meta, "model.diffusion_model.")
    assert type(config).__name__ == {"sd15": "SD15", "sd21": "SD20", "sdxl": "SDXL"}[family]
    unet = openaimodel.UNetModel(**config.unet_config, device="meta", operations=comfy.ops.disable_weight_init)
    prefix = "model.diffusion_model."
    ours = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    assert {name: tuple(value.shape) for name, value in unet.state_dict().items()} == ours

    with torch.device("meta"):
        clip_target = config.clip_target({})
        text_encoders = clip_target.clip(device="meta", dtype=torch.float16)
    text = {name: tensor for name, tensor in meta.items() if name.startswith(("cond_stage_model.", "conditioner."))}
    found = config.process_clip_state_dict(text)
    expected = {name: value.shape for name, value in text_encoders.state_dict().items()}
    unstored = {
        name for name in expected if name.endswith(("clip_l.logit_scale", "clip_l.transformer.text_projection.weight"))
    }
    assert {name: value.shape for name, value in found.items() if not name.endswith("position_ids")} == {
        name: shape for name, shape in expected.items() if name not in unstored
    }
