"""Opening a base: every form it comes in, what is refused and how, and the weights that arrive in the modules."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.families import FAMILIES
from comfyui_personalize.trainers.base import load_other_vae, open_base
from comfyui_personalize.trainers.text import PromptEncoder

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def weights_of(tiny_checkpoint):
    return lambda family: load_file(tiny_checkpoint(family))


def outputs(base) -> list[torch.Tensor]:
    """What every part of a base computes from fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
    text = encoder.encode_frozen(["a photo of a dog", ""])
    vae = base.load_vae()
    mean, std = vae.encode_moments(torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1)
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)}
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    unet = base.load_unet()
    with torch.no_grad():
        prediction = unet(noisy, torch.tensor([10, 900]), text.embeds, added_cond_kwargs=added, return_dict=False)[0]
    return [text.embeds, prediction, mean, std, vae.decode(mean)]


def save_folder(base, folder: Path, **scheduler) -> Path:
    """The base as a diffusers folder."""
    base.load_unet().save_pretrained(folder / "unet")
    for index, encoder in enumerate(base.load_text_encoders()):
        encoder.save_pretrained(folder / ("text_encoder" if index == 0 else f"text_encoder_{index + 1}"))
    base.load_vae().module.save_pretrained(folder / "vae")
    base.tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    settings = {"prediction_type": base.prediction_type, "beta_schedule": "scaled_linear"} | scheduler
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def test_single_file(family, tiny_checkpoint):
    base = open_base(tiny_checkpoint(family))
    assert base.family is FAMILIES[family]
    assert base.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    assert base.label.startswith(base.family.label) and base.name in base.label
    modules = [base.load_unet(), *base.load_text_encoders(), base.load_vae().module]
    for module in modules:
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_layers_per_block_are_counted(tiny_checkpoint):
    counts = {name: open_base(tiny_checkpoint(name)).layers_per_block for name in ("sd15", "sdxl", "world_sdxl")}
    assert counts == {"sd15": 2, "sdxl": 2, "world_sdxl": 1}


def test_weights_arrive_in_the_asked_precision(tiny_checkpoint, weights_of):
    base, weights = open_base(tiny_checkpoint("sdxl")), weights_of("sdxl")
    unet = base.load_unet(torch.bfloat16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert torch.equal(unet.conv_in.weight, weights[f"{UNET}input_blocks.0.0.weight"].bfloat16())
    assert base.load_vae(torch.float16).dtype == base.load_vae(torch.bfloat16).dtype == torch.float32
    second = base.load_text_encoders(torch.bfloat16)[1]
    joint = weights["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"].bfloat16()
    attention = second.text_model.encoder.layers[1].self_attn
    assert torch.equal(torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"]), joint)
    projection = weights["conditioner.embedders.1.model.text_projection"].bfloat16()
    assert torch.equal(second.text_projection.weight, projection.T)


def test_diffusers_folder_is_the_same_base(family, tiny_checkpoint, tmp_path):
    single = open_base(tiny_checkpoint(family))
    folder = open_base(save_folder(single, tmp_path / "model"))
    assert folder.layers_per_block == single.layers_per_block
    assert folder.family is single.family and folder.prediction_type == single.prediction_type
    assert torch.equal(folder.noise_schedule().alphas_cumprod, single.noise_schedule().alphas_cumprod)
    assert folder.tokenizer_folder == tmp_path / "model" / "tokenizer"
    for place, (ours, theirs) in enumerate(zip(outputs(folder), outputs(single), strict=True)):
        # A TAESD saved by diffusers has no scale of its own; the checkpoint's is rounded to float16, by 1e-4.
        torch.testing.assert_close(ours, theirs, atol=1e-5 if place < 2 else 2e-4, rtol=2e-4)


def test_text_encoders_of_a_folder_pool_at_the_true_end_token(tiny_checkpoint, tmp_path):
    folder = save_folder(open_base(tiny_checkpoint("sdxl")), tmp_path / "model")
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))  # as SDXL was published
    assert open_base(folder).load_text_encoders()[1].config.eos_token_id == 49407


def test_scheduler_of_a_folder(tiny_checkpoint, tmp_path):
    single = open_base(tiny_checkpoint("sd15"))
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    base = open_base(save_folder(single, tmp_path / "model", **settings))
    assert base.prediction_type == "v_prediction" and base.noise_schedule().alphas_cumprod[-1] == 0
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "sample"}))
    with pytest.raises(IncompatibleModelError, match="its scheduler predicts 'sample'"):
        open_base(tmp_path / "model")


def test_pickled_checkpoint(tiny_checkpoint, weights_of, tmp_path):
    torch.save({"state_dict": weights_of("sd15"), "epoch": 3}, tmp_path / "old.ckpt")
    base = open_base(tmp_path / "old.ckpt")
    for ours, theirs in zip(outputs(base), outputs(open_base(tiny_checkpoint("sd15"))), strict=True):
        assert torch.equal(ours, theirs)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path(__file__).with_name("executed"),)


def test_malicious_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.ckpt")
    with pytest.raises(FormatError, match="evil.ckpt: refused"):
        open_base(tmp_path / "evil.ckpt")
    assert not Path(__file__).with_name("executed").exists()


def test_prediction_type(weights_of, tmp_path, tiny_checkpoint):
    weights = weights_of("sdxl") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(weights, tmp_path / "v.safetensors")
    base = open_base(tmp_path / "v.safetensors")
    assert base.prediction_type == "v_prediction" and "v-prediction" in base.label
    assert base.noise_schedule().alphas_cumprod[-1] == 0
    assert open_base(tmp_path / "v.safetensors", prediction_type="epsilon").prediction_type == "epsilon"
    assert open_base(tiny_checkpoint("sd15"), prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match="prediction_type is 'x0'"):
        open_base(tiny_checkpoint("sd15"), prediction_type="x0")


def test_older_names_of_the_text_encoders(weights_of, tmp_path, tiny_checkpoint):
    """SD1.x files without ``text_model.``, and SD2.1 in the layout of generative-models."""
    renames = {
        "sd15": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        "sd21": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    }
    for family, (new, old) in renames.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights_of(family).items()}
        weights[f"{old}embeddings.position_ids"] = torch.arange(77)
        save_file(weights, tmp_path / f"{family}.safetensors")
        ours, theirs = open_base(tmp_path / f"{family}.safetensors"), open_base(tiny_checkpoint(family))
        assert ours.family is theirs.family
        assert torch.equal(outputs(ours)[0], outputs(theirs)[0])


def test_separate_autoencoder(weights_of, tmp_path, tiny_checkpoint, load_helper):
    """A file of its own, a checkpoint's autoencoder, and a diffusers folder; the base needs none then."""
    weights = weights_of("sd15")
    other = load_helper("tiny/checkpoints.py").tiny_state_dict("sd15", seed=5)
    other = {name.removeprefix(VAE): tensor for name, tensor in other.items() if name.startswith(VAE)}
    save_file(other, tmp_path / "vae.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith(VAE)}, tmp_path / "without.safetensors")
    with pytest.raises(IncompatibleModelError, match=r"without.safetensors: found no autoencoder \(VAE\)"):
        open_base(tmp_path / "without.safetensors")

    own = open_base(tiny_checkpoint("sd15"))
    separate = open_base(tmp_path / "without.safetensors", vae=tmp_path / "vae.safetensors")
    whole = open_base(tmp_path / "without.safetensors", vae=tiny_checkpoint("sd15"))
    separate.load_vae().module.save_pretrained(tmp_path / "folder")
    folder = open_base(tmp_path / "without.safetensors", vae=tmp_path / "folder")
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    means = [base.load_vae().encode_moments(pictures)[0] for base in (own, separate, whole, folder)]
    assert torch.equal(means[0], means[2]) and not torch.allclose(means[0], means[1])
    torch.testing.assert_close(means[1], means[3])
    with pytest.raises(FormatError, match="no such VAE"):
        open_base(tiny_checkpoint("sd15"), vae=tmp_path / "absent.safetensors")
    with pytest.raises(IncompatibleModelError, match="16 latent channels"):
        save_file(
            {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3), "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)},
            tmp_path / "flux_vae.safetensors",
        )
        open_base(tiny_checkpoint("sd15"), vae=tmp_path / "flux_vae.safetensors")


def test_a_taesd_in_every_layout(weights_of, tmp_path, tiny_checkpoint):
    weights, base = weights_of("sdxl"), open_base(tiny_checkpoint("sdxl"))
    halves = {
        half: {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
        for half in ("encoder", "decoder")
        for name in [f"{VAE}taesd_{half}."]
    }
    for half, tensors in halves.items():  # as the authors publish them
        save_file(tensors, tmp_path / f"taesdxl_{half}.safetensors")
    torch.save(halves["decoder"], tmp_path / "taesdxl_decoder.pth")
    base.load_vae().module.save_pretrained(tmp_path / "folder")
    whole = (tmp_path / "folder", tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    decoders = (tmp_path / "taesdxl_decoder.safetensors", tmp_path / "taesdxl_decoder.pth")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = base.load_vae().decode(latents)
    for path in (*whole, *decoders):
        found = load_other_vae(path, base.family, torch.float32, "cpu").decode(latents)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)  # the checkpoint's own scale is rounded
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder, file = (open_base(tiny_checkpoint("sdxl"), vae=path).load_vae().encode_moments(pictures) for path in whole)
    assert torch.equal(folder[0], file[0])

    with pytest.raises(IncompatibleModelError, match="taesdxl_decoder.safetensors: found no autoencoder"):
        open_base(tiny_checkpoint("sdxl"), vae=decoders[0])
    for change, message in (
        ({"1.weight": torch.zeros(64, 16, 3, 3)}, "16 latent channels"),
        ({"1.weight": torch.zeros(64)}, "0 latent channels"),
        ({"strange": torch.zeros(1)}, r"has unknown weights \(1, such as strange"),
        ({"1.bias": torch.zeros(3)}, r"has misshapen weights \(1, such as decoder.layers.0.bias"),
    ):
        save_file(halves["decoder"] | change, tmp_path / "other.safetensors")
        with pytest.raises(IncompatibleModelError, match=f"other.safetensors: .*{message}"):
            load_other_vae(tmp_path / "other.safetensors", base.family, torch.float32, "cpu")
    with pytest.raises(IncompatibleModelError, match="taesdxl_encoder.safetensors: found no autoencoder"):
        load_other_vae(tmp_path / "taesdxl_encoder.safetensors", base.family, torch.float32, "cpu")


def test_kl_autoencoder_of_a_folder_with_names_of_old(tmp_path, tiny_checkpoint):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(32, 64)).eval()
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, name in old.items():
        weights = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in weights.items()
        }
    save_file(weights, path)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        expected = vae.decode(posterior.mean).sample.clamp(-1, 1)
    for source in (tmp_path / "vae", path):  # the folder, with its own sizes, and the file alone, by its shapes
        ours = open_base(tiny_checkpoint("sdxl"), vae=source).load_vae()
        mean, std = ours.encode_moments(pictures)
        torch.testing.assert_close(mean, posterior.mean * 0.13025)
        torch.testing.assert_close(std, posterior.std * 0.13025)
        torch.testing.assert_close(ours.decode(mean), expected)


def test_fingerprint_names_the_contents(weights_of, tmp_path, tiny_checkpoint):
    path = tiny_checkpoint("sd15")
    first = open_base(path).fingerprint
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    assert open_base(tmp_path / "copy.safetensors").fingerprint == first
    assert open_base(path, prediction_type="v_prediction").fingerprint != first
    changed = weights_of("sd15")
    changed = {name: tensor + 0.5 if name.startswith(UNET) else tensor for name, tensor in changed.items()}
    save_file(changed, tmp_path / "changed.safetensors", metadata={"format": "pt"})
    assert open_base(tmp_path / "changed.safetensors").fingerprint != first


def without(prefix):
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(prefix)}


def wider_input(channels):
    name = f"{UNET}input_blocks.0.0.weight"
    return lambda weights: weights | {name: torch.zeros(weights[name].shape[0], channels, 3, 3)}


def only(*names):
    return lambda weights: {name: torch.zeros(4, 4) for name in names}


def plus(name, *shape):
    return lambda weights: weights | {name: torch.zeros(shape)}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


@pytest.mark.parametrize(
    "source, change, found",
    [
        ("sd15", only(f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale"), "Flux weights"),
        ("sd15", only("double_blocks.0.img_attn.qkv.weight"), "Flux weights"),
        ("sd15", only(f"{UNET}joint_blocks.0.context_block.attn.qkv.weight"), "SD3 weights"),
        ("sd15", only("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"), "a LoRA"),
        ("sd15", only("decoder.conv_in.weight", "encoder.conv_in.weight"), r"an autoencoder \(VAE\)"),
        ("sd15", only("clip_l", "clip_g"), "a text embedding"),
        ("sd15", only("what.is.this"), "1 tensors of an unknown model"),
        ("sd15", wider_input(9), r"an inpainting model \(9 input channels\)"),
        ("sdxl", wider_input(9), r"an inpainting model \(9 input channels\)"),
        ("sd15", wider_input(8), "an image-editing or video model"),
        ("sd21", wider_input(5), "a depth-conditioned model"),
        ("sd15", without("cond_stage_model."), "a UNet without text encoders"),
        ("sd15", renamed(UNET, ""), "a UNet without text encoders and autoencoder"),
        ("sd21", plus(f"{UNET}label_emb.0.0.weight", 256, 1536), "an unCLIP model"),
        ("sdxl", lambda w: renamed("embedders.1.", "embedders.0.")(without("conditioner.embedders.0.")(w)), "refiner"),
        ("sdxl", plus("edm_mean", 1), "EDM noise levels"),
        ("sdxl", plus(f"{UNET}label_emb.0.0.weight", 128, 99), "an unknown UNet .* vector width 99"),
        ("sdxl", without(f"{UNET}middle_block.1."), "a distilled or pruned SDXL UNet"),
        ("sdxl", without(f"{UNET}output_blocks.0.1.transformer_blocks.1."), "a distilled or pruned SDXL UNet"),
    ],
)
def test_other_models_are_refused_by_name(weights_of, tmp_path, source, change, found):
    path = tmp_path / "other.safetensors"
    save_file({name: value.clone() for name, value in change(weights_of(source)).items()}, path)
    with pytest.raises(IncompatibleModelError, match=rf"other.safetensors: found .*{found}") as caught:
        open_base(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (without(f"{UNET}out.0."), r"unet part lacks weights \(2, such as conv_norm_out"),
        (plus(f"{UNET}input_blocks.1.0.in_layers.2.scale_weight", 1), r"the unet part has unknown weights \(1"),
        (plus(f"{UNET}strange", 1), r"the UNet has weights that SD1.5 does not know \(1"),
        (plus(f"{UNET}time_embed.0.bias", 3), r"unet part has misshapen weights \(1, such as time_embedding"),
    ],
)
def test_unet_must_fit_exactly(weights_of, tmp_path, change, message):
    path = tmp_path / "broken.safetensors"
    save_file(change(weights_of("sd15")), path)
    with pytest.raises(IncompatibleModelError, match=message):
        open_base(path).load_unet()


def test_text_encoder_must_fit_exactly(weights_of, tmp_path):
    for family, name in (("sd15", "text_model.encoder.layers.1.mlp.fc1.bias"), ("sd21", "resblocks.0.ln_2.bias")):
        path = tmp_path / f"{family}.safetensors"
        save_file({key: value for key, value in weights_of(family).items() if not key.endswith(name)}, path)
        with pytest.raises(IncompatibleModelError, match=r"the text part lacks weights \(1"):
            open_base(path).load_text_encoders()


def test_damaged_files_are_refused(tiny_checkpoint, tmp_path):
    whole = tiny_checkpoint("sd15").read_bytes()
    for name, contents, message in (
        ("short", whole[:-1000], "truncated"),
        ("header", whole[:500], "not a safetensors file"),
        ("page", b"<!DOCTYPE html><html>sign in first</html>" * 100, "not a safetensors file"),
        ("empty", b"", "not a safetensors file"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(contents)
        with pytest.raises(FormatError, match=f"{name}.safetensors: {message}"):
            open_base(path)
    with pytest.raises(FormatError, match="no such checkpoint or diffusers folder"):
        open_base(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 9}, "with 9 input channels"),
        ({"class_embed_type": "projection"}, "conditioned on more than text"),
        ({"_class_name": "UNetSpatioTemporalConditionModel"}, "a UNetSpatioTemporalConditionModel"),
        ({"addition_embed_type": "text_time"}, "a UNet without text encoders"),
        ({"cross_attention_dim": 999}, "a UNet for text of width 999"),
        ({"layers_per_block": [2, 1]}, r"a distilled UNet with \[2, 1\] layers in its levels"),
    ],
)
def test_other_folders_are_refused(tiny_checkpoint, tmp_path, change, message):
    folder = save_folder(open_base(tiny_checkpoint("sd15")), tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(IncompatibleModelError, match=message):
        open_base(folder)


def test_folder_of_another_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(IncompatibleModelError, match="found a FluxPipeline without a UNet"):
        open_base(tmp_path)


def test_folder_without_weights(tiny_checkpoint, tmp_path):
    folder = save_folder(open_base(tiny_checkpoint("sd15")), tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FormatError, match="holds no weights"):
        open_base(folder)


def test_sharded_folder(tiny_checkpoint, tmp_path):
    single = open_base(tiny_checkpoint("sd15"))
    folder = save_folder(single, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    single.load_unet().save_pretrained(folder / "unet", max_shard_size="2MB")
    base = open_base(folder)
    assert len(base.unet.weights.paths) > 1
    torch.testing.assert_close(outputs(base)[1], outputs(single)[1])


def test_hub_id(tiny_checkpoint, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    folder = save_folder(open_base(tiny_checkpoint("sd15")), tmp_path / "model")
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name: asked.append(name) or str(folder))
    assert open_base("someone/some-model.v1").family.name == "sd15" and asked == ["someone/some-model.v1"]

    def offline(name):
        raise OSError("we couldn't connect\nsecond line")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(FormatError, match="neither a path nor a model that could be downloaded .we couldn't connect."):
        open_base("someone/some-model")
