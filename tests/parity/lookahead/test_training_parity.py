"""One whole iteration of the authors' training loop: both halves, with their gradients, clipping and AdamW steps."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from comfyui_personalize.models.lookahead.arcface import build_arcface
from comfyui_personalize.models.lookahead.losses import identity_loss, noise_loss
from comfyui_personalize.models.lora import parse_lora
from comfyui_personalize.models.schedules import NoiseSchedule
from comfyui_personalize.trainers.adapters import with_prefix_removed
from comfyui_personalize.trainers.clip_vision import clip_pictures
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.lookahead.identity_attention import IdentityAttention
from comfyui_personalize.trainers.lookahead.step import Rows, denoise, look_ahead, trained_parameters
from comfyui_personalize.trainers.optimizer import clip_gradients

PAD = 200
"""The authors' landmarks are those of pictures with so many pixels around them."""


@pytest.fixture
def given(case):
    """Inputs of both halves, which lie in one file."""
    return case.sibling(case.config["inputs"].removesuffix(".safetensors")) if "inputs" in case.config else case


@pytest.fixture
def identity(case, tiny_unet, encoder) -> IdentityAttention:
    lora = case.sibling(case.config["lcm_lora"].removesuffix(".safetensors")).weights
    own = {key.removeprefix("lcm_lora."): value for key, value in lora.items()}
    deltas = with_prefix_removed(parse_lora(own, layers_per_block=tiny_unet.config.layers_per_block), "unet")
    return IdentityAttention(tiny_unet, encoder, preview=deltas, trainable=True)


def our_name(theirs: str) -> str:
    """``encoder_unet.<block>.extract_kv1.to_k.lora_layer.down.weight`` and its like in the slim file's words."""
    name = theirs.removeprefix("encoder_unet.")
    if name.startswith("image_proj_model."):
        return name.replace("image_proj_model", "resampler", 1)
    if ".extract_kv2." in name:
        return "adapter." + name.replace(".extract_kv2", "")
    name = name.replace(".lora_layer", "").removesuffix(".weight")
    return "copies." + name.replace(".extract_kv1", "") if ".extract_kv1." in name else f"lora.{name}"


@pytest.fixture
def training(case, given, identity, resampler, shared):
    """The trained parameters by the authors' names, and the two halves as functions that give a loss."""
    groups = trained_parameters(identity, resampler)
    ours = groups[0] | groups[1]
    names = case.config["param_names"]
    parameters = {name: ours[our_name(name)] for name in names}
    assert len(parameters) == len(ours)
    assert {our_name(name) for name in names[: case.config["n_encoder_params"]]} == groups[0].keys()
    assert [list(one.shape) for one in parameters.values()] == case.config["param_shapes"]
    rows, schedule = _rows(case, given, shared), NoiseSchedule.scaled_linear()
    tiny = AutoencoderTiny(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in case.config["taesd"].items()}
    ).requires_grad_(False)
    decoder = {key.removeprefix("taesd."): value for key, value in given.weights.items() if key.startswith("taesd.")}
    assert not tiny.load_state_dict(decoder, strict=False).unexpected_keys
    pictures = given.inputs["encoder_pixel_values"]
    points, target_points = (given.inputs[f"landmarks_{name}"] - PAD for name in ("pred", "encoder"))
    shared_settings = {
        "kv_drop_chance": case.config["kv_drop_chance"],
        "adapter_scale": case.config["adapter_attention_scale"],
    }

    def half(name, timesteps, **told):
        def uniform(block, tokens):
            return given.inputs[f"kv_rand.{name}.{block}"]

        return denoise(identity, resampler, schedule, rows, timesteps, uniform=uniform, **shared_settings, **told)

    def diffusion():
        dropped = given.inputs["adapter_drop_rand"] < case.config["adapter_drop_chance"]
        denoised = half("diffusion", given.inputs["timesteps"], dropped=dropped)
        return denoised, noise_loss(denoised.prediction, rows.noise) * case.config["noise_loss_weight"]

    def lookahead(embed, size):
        timesteps, scale = given.inputs["lcm_timesteps"], case.config["lcm_lora_scale"]
        denoised = half("lcm", timesteps, preview_scale=scale)
        latents, seen = look_ahead(schedule, denoised, timesteps, lambda latents: tiny.decode(latents).sample)
        plain = identity_loss(embed, seen, points, pictures, target_points, size=size, how="authors")
        loss = plain * case.config["id_loss_weight"] * scale
        return SimpleNamespace(**denoised._asdict(), latents=latents, pictures=seen, plain=plain, loss=loss)

    encoder_group = [ours[our_name(name)] for name in names[: case.config["n_encoder_params"]]]
    return SimpleNamespace(parameters=parameters, encoder=encoder_group, diffusion=diffusion, lookahead=lookahead)


def _rows(case, given, shared) -> Rows:
    sizes = case.config["clip"]
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).eval()
    prefix = "image_encoder."
    weights = {key.removeprefix(prefix): value for key, value in shared.weights.items() if key.startswith(prefix)}
    missing, unexpected = vision.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("position_ids") for key in missing)
    pixels = clip_pictures(given.inputs["encoder_pixel_values"], sizes["image_size"])
    with torch.no_grad():
        states = vision(torch.cat([pixels, torch.zeros_like(pixels[:1])]), output_hidden_states=True).hidden_states[-2]
    side = float(case.config["train_resolution_in_time_ids"])
    time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(pixels))
    factor = case.config["vae_scaling_factor"]
    return Rows(
        given.inputs["latent_unscaled"] * factor,
        given.inputs["noise"],
        given.inputs["enc_latent_unscaled"] * factor,
        Conditioning(given.inputs["text"], given.inputs["pooled"], time_ids),
        Conditioning(given.inputs["enc_text"], given.inputs["enc_pooled"], time_ids),
        states[:-1],
        states[-1:],
    )


@pytest.fixture
def smooth_face(given):
    """The embedding that stands in for the face network, whose kinks would make gradients irreproducible."""

    def embed(faces):
        z = F.avg_pool2d(faces, 8).flatten(1)
        return F.normalize(torch.tanh(z @ given.weights["face.a"].T) @ given.weights["face.b"].T, dim=1)

    return embed


def _check_gradients(case, half, training):
    gradients = {name: parameter.grad for name, parameter in training.parameters.items()}
    norms = torch.stack([gradient.norm() for gradient in gradients.values()])
    case.check(f"{half}.grad_norms", norms)
    for name in [name for name in case.expected if name.startswith(f"{half}.grad.")]:
        case.check(name, gradients[name.removeprefix(f"{half}.grad.")])


def _check_lookahead(case, found):
    case.check("lcm.adapter_states", found.tokens)
    case.check("lcm.prediction", found.prediction)
    case.check("lcm.denoised", found.latents)
    case.check("lcm.pixels_b0", found.pictures[0])
    case.check("lcm.id_loss_unweighted", found.plain.reshape(1))
    case.check("lcm.loss", found.loss.reshape(1))


@pytest.mark.golden("lookahead", "09_*")
def test_a_whole_iteration(case, training, smooth_face):
    adam, clip = case.config["adamw"], case.config["max_grad_norm"]
    rest = [one for one in training.parameters.values() if all(one is not other for other in training.encoder)]
    optimizer = torch.optim.AdamW(
        [{"params": training.encoder, "lr": adam["lr_encoder"]}, {"params": rest, "lr": adam["lr_adapter"]}],
        betas=adam["betas"],
        weight_decay=adam["weight_decay"],
        eps=adam["eps"],
    )

    def step(half, clipped):
        _check_gradients(case, half, training)
        case.check(f"{half}.total_norm_before_clip", clip_gradients(clipped, clip).reshape(1))
        optimizer.step()
        optimizer.zero_grad()
        moments = {name: optimizer.state[one]["exp_avg"] for name, one in training.parameters.items()}
        case.check(f"{half}.exp_avg_norms", torch.stack([moment.norm() for moment in moments.values()]))
        for name in [name for name in case.expected if name.startswith(f"{half}.exp_avg.")]:
            case.check(name, moments[name.removeprefix(f"{half}.exp_avg.")])

    denoised, loss = training.diffusion()
    case.check("diffusion.adapter_states", denoised.tokens)
    case.check("diffusion.prediction", denoised.prediction)
    case.check("diffusion.noise_loss_unweighted", loss.reshape(1) / case.config["noise_loss_weight"])
    case.check("diffusion.loss", loss.reshape(1))
    loss.backward()
    step("diffusion", training.encoder)

    found = training.lookahead(smooth_face, 112)
    _check_lookahead(case, found)
    found.loss.backward()
    step("lcm", [*training.parameters.values()])
    for name in [name for name in case.expected if name.startswith("after.")]:
        case.check(name, training.parameters[name.removeprefix("after.")])


@pytest.mark.golden("lookahead", "09b_*")
def test_the_lookahead_half_alone(case, training, smooth_face):
    found = training.lookahead(smooth_face, 112)
    _check_lookahead(case, found)
    found.loss.backward()
    _check_gradients(case, "lcm", training)
    everything = [*training.parameters.values()]
    case.check("lcm.total_norm_before_clip", clip_gradients(everything, 0).reshape(1))

    for parameter in everything:
        parameter.grad = None
    weights = case.sibling(case.config["arcface_weights"].removesuffix(".safetensors")).weights
    network = build_arcface(weights, "tiny")
    found = training.lookahead(network, network.size)
    case.check("arcface.loss", found.loss.reshape(1))
    found.loss.backward()
    _check_gradients(case, "arcface", training)
    case.check("arcface.total_norm_before_clip", clip_gradients(everything, 0).reshape(1))
