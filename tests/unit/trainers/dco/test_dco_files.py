"""The files of a training, read by diffusers' own loaders, give what the trained model in memory gives."""

import json

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.formats import read_header, stored_tokens
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.settings import OutputSettings

BUNDLE = {"save_precision": "fp16", "bundle_tokens": True}
TOKENS = LearnedToken("<dog>", "dog"), LearnedToken("<my-hat>", "hat", rows=2)
PROMPT = "a <dog> wearing a <my-hat> at night"


def pipeline(base):
    """diffusers' pipeline of the family, from the untrained parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {
        "vae": base.load_vae().module,
        "unet": base.load_unet(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    encoders = base.load_text_encoders()
    parts |= {"text_encoder": encoders[0], "tokenizer": base.tokenizer()}
    if base.family.size_conditioning:
        second = base.tokenizer()
        second.pad_token = "!"
        return StableDiffusionXLPipeline(**parts, text_encoder_2=encoders[1], tokenizer_2=second)
    if not base.family.encoders[0].pad_with_end:
        parts["tokenizer"].pad_token = "!"
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )


def load_tokens(pipe, files):
    slots = {"clip_l": ("text_encoder", "tokenizer"), "clip_h": ("text_encoder", "tokenizer")}
    slots["clip_g"] = ("text_encoder_2", "tokenizer_2")
    for token, path in zip(TOKENS, files, strict=True):
        for key, rows in load_file(path).items():
            encoder, tokenizer = (getattr(pipe, name) for name in slots[key])
            pipe.load_textual_inversion({key: rows}, token=token.trigger, text_encoder=encoder, tokenizer=tokenizer)


@torch.no_grad()
def encode(pipe):
    result = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return result[0], result[2] if len(result) == 4 else None


@torch.no_grad()
def draw(unet, embeds, pooled):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    added = None
    if pooled is not None:
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return unet(noisy, torch.tensor([500]), embeds, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "world_sd15", "world_sdxl"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_diffusers_reads_what_was_trained(family, precision, tiny, inside):
    captions = [f"a <dog> with a <my-hat>, number {number}" for number in range(4)]
    dataset = tiny.dataset(*TOKENS, captions=captions)
    rates = {"learning_rate": 1e-2, "text_learning_rate": 1e-2}
    result = tiny.train(family, dataset, train_text_encoder=True, save_precision=precision, **rates)
    told = inside.text[0].policy([PROMPT], None)
    embeds, pooled = told.embeds.detach(), None if told.pooled is None else told.pooled.detach()
    trained = draw(inside.unet[0], embeds, pooled)

    pipe = pipeline(tiny.base(family))
    plain = draw(pipe.unet, embeds, pooled)
    pipe.load_lora_weights(result.files[0].parent, weight_name=result.files[0].name)
    load_tokens(pipe, result.files[1:])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 2e-3, "atol": 2e-3}
    their_embeds, their_pooled = encode(pipe)
    torch.testing.assert_close(their_embeds, embeds, **tolerance)
    if pooled is not None:
        torch.testing.assert_close(their_pooled, pooled, **tolerance)
    drawn = draw(pipe.unet, embeds, pooled)
    torch.testing.assert_close(drawn, trained, **tolerance)
    # The training changed more than any of these tolerances.
    assert (trained - plain).abs().max() > 20 * tolerance["atol"]


def test_a_file_tells_how_it_was_made(tiny):
    captions = [f"a <dog> with a <my-hat>, number {number}" for number in range(4)]
    result = tiny.train("sdxl", tiny.dataset(*TOKENS, captions=captions), steps=1, **BUNDLE)
    lora, *embeddings = result.files
    metadata = read_header(lora).metadata
    assert stored_tokens(metadata) == TOKENS
    assert metadata["personalize.layers_per_block"] == "2"
    assert metadata["personalize.family"] == "sdxl" and metadata["personalize.method"] == "dco"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (metadata["ss_network_dim"], metadata["ss_base_model_version"]) == ("4", "sdxl_base_v1-0")
    config = json.loads(metadata["personalize.config"])
    assert (config["beta"], config["rank"], config["seed"]) == (10.0, 4, 0)
    header = read_header(lora)
    bundled = {name: dtype for name, dtype in header.dtypes.items() if name.startswith("bundle_emb.")}
    assert bundled == {f"bundle_emb.{t}.{k}": "F32" for t in ("dog", "my-hat") for k in ("clip_l", "clip_g")}
    assert {dtype for name, dtype in header.dtypes.items() if name not in bundled} == {"F16"}
    for token, path in zip(TOKENS, embeddings, strict=True):
        assert stored_tokens(read_header(path).metadata) == (token,)
        assert path.name == f"my_dog_{token.trigger.strip('<>')}.safetensors"
        stored, whole = load_file(path), load_file(lora)
        for key, rows in stored.items():
            assert torch.equal(rows, whole[f"bundle_emb.{token.trigger.strip('<>')}.{key}"])


BAD_NAMES = [
    "../up", "..", ".", "", "   ", "/etc/passwd", "a/b", "a\\b", "C:evil", "con", "NUL.txt", "lpt1", "line\nbreak",
    "nul\0byte", "question?", "star*", "pipe|", "<angle>", "dot.", "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="^output name .*give a plain name such as my_dog$"):
        OutputPlace(name, tmp_path, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="^output name "):
        OutputSettings(name=name, folder=tmp_path).place()
    assert list(tmp_path.iterdir()) == []


def test_spaces_around_a_name_are_not_part_of_it(tmp_path):
    place = OutputSettings(name=" my dog ", folder=tmp_path).place()
    assert place.lora_path == tmp_path / "loras" / "my dog.safetensors"
    assert place.run_folder == tmp_path / "runs" / "my dog"


def test_one_token_is_named_like_the_lora_and_several_carry_their_own(tmp_path):
    place = OutputPlace("pet", tmp_path / "l", tmp_path / "e", tmp_path / "r")
    assert place.embedding_path(TOKENS[0], TOKENS[:1]).name == "pet.safetensors"
    assert [place.embedding_path(t, TOKENS).name for t in TOKENS] == ["pet_dog.safetensors", "pet_my-hat.safetensors"]


@pytest.mark.parametrize("triggers", [("<a.b>", "<a_b>"), ("<Ä;>", "<ä;>"), ("<x!>", "<X?>")])
def test_tokens_whose_files_would_collide_are_refused(triggers, tmp_path):
    place = OutputPlace("pet", tmp_path / "l", tmp_path / "e", tmp_path / "r", overwrite=True)
    with pytest.raises(ConfigError, match="would be saved as .* like the token .*; rename the token"):
        place.check([LearnedToken(trigger, "dog") for trigger in triggers])


def test_a_token_too_long_for_a_file_name_is_refused(tmp_path):
    place = OutputPlace("pet", tmp_path / "l", tmp_path / "e", tmp_path / "r")
    with pytest.raises(ConfigError, match="longer than 200 bytes"):
        place.check([LearnedToken("<" + "a" * 250 + ">", "dog"), TOKENS[0]])


def test_one_folder_for_all_files_is_refused_only_where_they_collide(tmp_path):
    place = OutputPlace("pet", tmp_path, tmp_path, tmp_path / "r")
    with pytest.raises(ConfigError, match="token <dog> would be saved as pet.safetensors, like the LoRA"):
        place.check(TOKENS[:1])
    place.check(TOKENS)


def test_existing_files_need_permission(tmp_path):
    place = OutputPlace("pet", tmp_path / "l", tmp_path / "e", tmp_path / "r")
    place.check(TOKENS)
    place.embedding_folder.mkdir()
    (place.embedding_folder / "pet_dog.safetensors").touch()
    with pytest.raises(ConfigError, match="pet_dog.safetensors exists already in e; choose another output name or"):
        place.check(TOKENS)
    place.check(TOKENS, may_exist=True)
    OutputPlace("pet", tmp_path / "l", tmp_path / "e", tmp_path / "r", overwrite=True).check(TOKENS)
    OutputPlace("other", tmp_path / "l", tmp_path / "e", tmp_path / "r").check(TOKENS)
