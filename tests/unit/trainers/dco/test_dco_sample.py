"""The command line's sampling: equal to plain guidance where it must be, true to the files, safe with them."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError, TrainingError
from comfyui_personalize.models.formats import describe
from comfyui_personalize.models.lora import kohya_tensors, parse_lora
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.__main__ import main
from comfyui_personalize.trainers.adapters import (
    ATTENTION,
    TEXT_ATTENTION,
    add_lora,
    lora_off,
    only_adapters,
    read_lora,
    set_lora,
    with_prefix_removed,
)
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.dco.sample import base_prompt_of, run, sample_pictures
from comfyui_personalize.trainers.dco.sample_config import SampleConfig, StyleSettings
from comfyui_personalize.trainers.personalization import PersonalizationSettings, open_personalization
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.sampling import Reward, guided, rewarded

CPU = torch.device("cpu")
DOG = LearnedToken("<dog>", "dog", rows=2)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randomize(parameters, seed):
    """Give B, which starts at zero, values with a visible effect."""
    draw = generator(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return open_base(tiny_checkpoint("sd15"))  # the smallest


@pytest.fixture(scope="module")
def make_lora(tiny_checkpoint, tmp_path_factory):
    """make_lora(seed, trigger) -> file of a random LoRA on UNet and text encoders, with a bundled token."""
    folder = tmp_path_factory.mktemp("loras")

    def make(seed=1, trigger="dog", *, rank=4, zero=False, tokens=True, family="sd15"):
        path = folder / f"{trigger}_{seed}_{zero}_{tokens}_{family}.safetensors"
        if path.exists():
            return path
        base = open_base(tiny_checkpoint(family))
        unet = base.load_unet()
        parameters = add_lora(unet, rank, ATTENTION, generator(seed))
        if not zero:
            randomize(parameters, seed)
        deltas = read_lora(unet, "unet")
        for index, encoder in enumerate(base.load_text_encoders()):
            parameters = add_lora(encoder, rank, TEXT_ATTENTION, generator(seed + 10))
            if not zero:
                randomize(parameters, seed + 10)
            deltas |= read_lora(encoder, "text_encoder" if index == 0 else "text_encoder_2")
        tensors = kohya_tensors(deltas, family)
        token = LearnedToken(f"<{trigger}>", trigger, rows=2)
        if tokens:
            for key, width in (("clip_l", 64), ("clip_g", 128))[: len(base.text_encoders)]:
                rows = torch.randn(2, width, generator=generator(seed)) * 0.1
                tensors[f"bundle_emb.{trigger}.{key}"] = rows
        listed = [token] if tokens else []
        save_file(tensors, path, describe("lora/1", family=family, method="dco", title="t", tokens=listed))
        return path

    return make


def settings(path, **more):
    return PersonalizationSettings(path=path, **more)


def values(checkpoint, lora, folder, **sample):
    """What a TOML file of the recipe holds."""
    defaults = {"prompt": "a <dog> in a field", "steps": 2, "width": 64, "height": 64}
    return {
        "device": "cpu",
        "base": {"path": str(checkpoint)},
        "lora": {"path": str(lora)},
        "sample": defaults | sample,
        "output": {"folder": str(folder), "name": "dog"},
    }


def draw(base, config, chosen, style=None, seeds=(5,)):
    """Pictures as bytes, for exact comparison."""
    opened = [open_personalization(item, base.family) for item in chosen]
    pictures = sample_pictures(config, base, opened, device=CPU, seeds=seeds, style=style)
    return [picture.tobytes() for _seed, picture in pictures]


def small(**more):
    return SampleConfig(**{"prompt": "a <dog> in a field", "steps": 2, "width": 64, "height": 64} | more)


def conditioning(seed):
    return Conditioning(torch.randn(1, 77, 64, generator=generator(seed)))


# Equalities


def test_a_lora_without_effect_gives_plain_guidance_of_the_base_prompt(base, make_lora):
    lora = settings(make_lora(zero=True, tokens=False))
    prompt = "a dog in a field"
    with_reward, without, scaled_to_nothing = (
        draw(base, small(prompt=prompt, reward_scale=scale), [lora])[0] for scale in (3.0, -1, 0.0)
    )
    assert without == scaled_to_nothing
    # A row alone and a row of two round differently, which the scales multiply.
    assert max(abs(one - other) for one, other in zip(with_reward, without, strict=True)) <= 1


def test_reward_scale_zero_ignores_lora_and_token(base, make_lora):
    full, empty = settings(make_lora()), settings(make_lora(zero=True, tokens=False))
    ignored = draw(base, small(reward_scale=0.0), [full])
    plain = draw(base, small(prompt="a dog in a field", reward_scale=-1), [empty])
    assert ignored == plain
    assert draw(base, small(reward_scale=3.0), [full]) != plain
    assert draw(base, small(reward_scale=-1), [full]) != plain


def test_a_lora_read_from_its_file_predicts_what_it_did_in_memory(base, tmp_path):
    trained = base.load_unet()
    randomize(add_lora(trained, 4, ATTENTION, generator(3)), 3)
    save_file(kohya_tensors(read_lora(trained, "unet"), "sd15"), tmp_path / "lora.safetensors")
    loaded = base.load_unet()
    opened = open_personalization(settings(tmp_path / "lora.safetensors"), base.family)
    set_lora(loaded, with_prefix_removed(opened.deltas, "unet"))
    x = torch.randn(1, 4, 8, 8, generator=generator(0))
    texts = [conditioning(seed) for seed in (1, 2, 3)]
    with torch.no_grad():
        kept, read = (
            guided(unet, *texts, text_scale=7.5, reward_scale=3.0)(x, torch.tensor(500)) for unet in (trained, loaded)
        )
        plain = guided(trained, *texts, text_scale=7.5)(x, torch.tensor(500))
    torch.testing.assert_close(read, kept, rtol=0, atol=0)
    assert not torch.allclose(plain, kept)


def test_a_text_encoder_lora_keeps_its_published_names_and_its_effect(tiny_checkpoint):
    base = open_base(tiny_checkpoint("sdxl"))
    for index, root in enumerate(("text_encoder", "text_encoder_2")):
        trained, loaded = base.load_text_encoders()[index], base.load_text_encoders()[index]
        randomize(add_lora(trained, 4, TEXT_ATTENTION, generator(3)), 3)
        tensors = kohya_tensors(read_lora(trained, root), "sdxl")
        start = f"lora_te{index + 1}_text_model_encoder_layers_0_self_attn_q_proj"
        assert f"{start}.lora_down.weight" in tensors
        set_lora(loaded, with_prefix_removed(parse_lora(tensors), root))
        ids = torch.tensor([[49406, 320, 1929, *[49407] * 74]])
        with torch.no_grad():
            kept, read = (encoder(input_ids=ids).last_hidden_state for encoder in (trained, loaded))
            with lora_off(trained):
                off = trained(input_ids=ids).last_hidden_state
        torch.testing.assert_close(read, kept, rtol=0, atol=0)
        assert not torch.allclose(off, kept)


def test_two_terms_are_the_formula_and_leave_the_adapters_on(base, make_lora):
    unet = base.load_unet()
    for adapter, seed in (("lora", 1), ("style", 2)):
        opened = open_personalization(settings(make_lora(seed)), base.family)
        set_lora(unet, with_prefix_removed(opened.deltas, "unet"), adapter=adapter)
    x, t = torch.randn(1, 4, 8, 8, generator=generator(0)), torch.tensor(500)
    uncond, text, subject, style = (conditioning(seed) for seed in range(4))
    with torch.no_grad():
        both_before = predict(unet, x, t, subject)
        rewards = [Reward(subject, 2.0, ("lora",)), Reward(style, 0.5, ("style",))]
        result = rewarded(unet, uncond, text, rewards, text_scale=4.0)(x, t)
        both_after = predict(unet, x, t, subject)
        with lora_off(unet):
            e0, e1 = predict(unet, x, t, uncond), predict(unet, x, t, text)
        with only_adapters(unet, ["lora"]):
            e2 = predict(unet, x, t, subject)
        with only_adapters(unet, ["style"]):
            e3 = predict(unet, x, t, style)
    assert torch.equal(both_before, both_after)
    assert not torch.allclose(both_before, e2)
    torch.testing.assert_close(result, e0 + 4 * (e1 - e0) + 2 * (e2 - e1) + 0.5 * (e3 - e1))


def test_strength_zero_is_no_lora_and_half_is_between(base, make_lora):
    config = small(prompt="a dog in a field", reward_scale=3.0)
    path = make_lora(tokens=False)
    off = draw(base, config, [settings(path, strength=0.0, text_strength=0.0)])
    assert off == draw(base, config, [settings(make_lora(zero=True, tokens=False))])
    half, full = draw(base, config, [settings(path, strength=0.5)]), draw(base, config, [settings(path)])
    assert len({*off, *half, *full}) == 3


def test_a_style_acts_together_or_with_its_own_scale(base, make_lora):
    subject, path = settings(make_lora(1)), make_lora(2, "paint")
    config = small(prompt="a <dog> in <paint> style")
    alone = draw(base, small(), [subject])
    styles = [StyleSettings(path=path, reward_scale=scale) for scale in (-1, 3.0, 0.0)]
    together, apart, ignored = (draw(base, config, [subject, style], style) for style in styles)
    assert len({*alone, *together, *apart, *ignored}) == 4


def test_a_picture_depends_on_its_own_seed_alone(base, make_lora):
    lora = settings(make_lora())
    both = draw(base, small(), [lora], seeds=(5, 6))
    assert both[1:] == draw(base, small(), [lora], seeds=(6,))
    assert both[0] != both[1]


# Prompts


def test_the_base_prompt_is_made_from_initializers():
    assert base_prompt_of(small(prompt="a <dog> on grass"), [DOG]) == "a dog on grass"
    assert base_prompt_of(small(base_prompt="a pet"), [DOG]) == "a pet"
    with pytest.raises(ConfigError, match="no ordinary word is known for <dog>"):
        base_prompt_of(small(), [LearnedToken("<dog>")])
    with pytest.raises(ConfigError, match="base_prompt contains the learned token <dog>"):
        base_prompt_of(small(base_prompt="a <dog>"), [DOG])


# Files


def test_the_authors_folder_brings_its_tokens(base, make_lora, tmp_path):
    tensors = load_file(make_lora(tokens=False))
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    rows = {"clip_l": torch.randn(2, 64), "clip_g": torch.randn(2, 128)}
    save_file(rows, tmp_path / "learned_embeds.safetensors")
    names = (LearnedToken("<a>", "dog"), LearnedToken("<b>"))
    opened = open_personalization(settings(tmp_path, tokens=names), base.family)
    assert opened.tokens == names
    read = opened.token_rows({"clip_l": 64, "clip_g": 128})
    assert all(torch.equal(read[key], rows[key]) for key in rows)
    with pytest.raises(IncompatibleModelError, match="clip_h of width 128"):
        opened.token_rows({"clip_h": 128})


def test_separate_embedding_files_and_new_names(base, make_lora, tmp_path):
    lora = make_lora(tokens=False)
    for name, width in (("one", 1.0), ("two", 2.0)):
        rows = {"clip_l": torch.full((1, 64), width), "clip_g": torch.full((1, 128), width)}
        token = [LearnedToken(f"<{name}>", "cat")]
        metadata = describe("embedding/1", family="sdxl", method="dco", title=name, tokens=token)
        save_file(rows, tmp_path / f"{name}.safetensors", metadata)
    files = (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    opened = open_personalization(settings(lora, embeddings=files), base.family)
    assert opened.tokens == (LearnedToken("<one>", "cat"), LearnedToken("<two>", "cat"))
    assert opened.token_rows({"clip_l": 64})["clip_l"][:, 0].tolist() == [1.0, 2.0]
    renamed = (LearnedToken("<x>", "dog"), LearnedToken("<y>", "dog"))
    assert open_personalization(settings(lora, embeddings=files, tokens=renamed), base.family).tokens == renamed
    with pytest.raises(ConfigError, match="hold 2 tokens, but 1 were named"):
        open_personalization(settings(lora, embeddings=files, tokens=(DOG,)), base.family)
    with pytest.raises(ConfigError, match="carries no learned tokens"):
        open_personalization(settings(lora, tokens=(DOG,)), base.family)


def test_another_familys_lora_is_named(base, make_lora, tmp_path):
    with pytest.raises(IncompatibleModelError, match=r"trained on SDXL, the base model is SD1.5"):
        open_personalization(settings(make_lora(family="sdxl")), base.family)
    with pytest.raises(FormatError, match="no such LoRA file"):
        open_personalization(settings(tmp_path / "absent.safetensors"), base.family)


def test_a_lora_that_does_not_fit_the_layers_is_refused(tiny_checkpoint, make_lora, tmp_path):
    save_file(load_file(make_lora(tokens=False)), tmp_path / "unnamed.safetensors")
    other = open_base(tiny_checkpoint("sdxl"))
    opened = open_personalization(settings(tmp_path / "unnamed.safetensors"), other.family)
    with pytest.raises(IncompatibleModelError, match="load the base model it was trained on"):
        list(sample_pictures(small(prompt="a dog"), other, [opened], device=CPU, seeds=[0]))


# The command


def test_a_lora_of_a_base_with_one_layer_per_block_finds_its_layers(tiny_checkpoint, tmp_path):
    base = open_base(tiny_checkpoint("world_sdxl"))
    unet = base.load_unet()
    randomize(add_lora(unet, 4, ATTENTION, generator(1)), 1)
    deltas = read_lora(unet, "unet")
    tensors = kohya_tensors(deltas, "sdxl", layers_per_block=1)
    save_file(tensors, tmp_path / "lora.safetensors")  # of another trainer: its metadata does not tell
    opened = open_personalization(settings(tmp_path / "lora.safetensors"), base.family, layers_per_block=1)
    assert opened.deltas.keys() == deltas.keys()
    given = values(tiny_checkpoint("world_sdxl"), tmp_path / "lora.safetensors", tmp_path / "out", prompt="a dog")
    assert run(given, SilentProgress(), Ranks()) == 0


def test_the_recipe_writes_pictures_that_say_how_they_were_made(tiny_checkpoint, make_lora, tmp_path, capsys):
    lora = make_lora(family="sdxl")
    given = values(tiny_checkpoint("sdxl"), lora, tmp_path / "out", count=2, seed=7, width=96)
    assert run(given, SilentProgress(), Ranks()) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["dog_7.png", "dog_8.png"]
    printed = capsys.readouterr().out
    assert all(f"saved {path}" in printed for path in files)
    with Image.open(files[1]) as picture:
        assert picture.size == (96, 64)
        made_with = json.loads(picture.text["personalize.sample"])
    assert (made_with["seed"], made_with["count"], made_with["reward_scale"]) == (8, 1, 3.0)
    assert made_with["lora"]["file"].startswith("dog_1")


def test_pictures_are_not_overwritten_unless_told(tiny_checkpoint, make_lora, tmp_path):
    given = values(tiny_checkpoint("sd15"), make_lora(), tmp_path, steps=1)
    (tmp_path / "dog_0.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="dog_0.png exists already"):
        run(given, SilentProgress(), Ranks())
    assert (tmp_path / "dog_0.png").read_bytes() == b"mine"
    given["output"]["overwrite"] = True
    assert run(given, SilentProgress(), Ranks()) == 0
    assert (tmp_path / "dog_0.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory at 64 x 64 in fp32; choose a smaller size"),
        (None, "the picture of seed 5 is not a number in fp32"),
    ],
)
def test_what_the_device_cannot_do_is_said(fails, sentence, base, make_lora, monkeypatch):
    def sampler(_scheduler, _predict, noise, _steps):
        if fails:
            raise fails
        yield noise * float("nan")

    monkeypatch.setattr("comfyui_personalize.trainers.dco.sample.sample", sampler)
    with pytest.raises(TrainingError, match=sentence):
        draw(base, small(), [settings(make_lora())])


class StopsAfter(SilentProgress):
    def __init__(self, steps):
        self.left = steps

    def cancelled(self):
        self.left -= 1
        return self.left < 0


def test_a_cancelled_run_keeps_its_finished_pictures(tiny_checkpoint, make_lora, tmp_path):
    given = values(tiny_checkpoint("sd15"), make_lora(), tmp_path, count=3, steps=3)
    assert run(given, StopsAfter(5), Ranks()) == 130  # one question after the prompts, then one a step
    assert [path.name for path in tmp_path.iterdir()] == ["dog_0.png"]


def test_ranks_share_the_pictures(tiny_checkpoint, make_lora, tmp_path):
    second = Ranks()
    second.index, second.count = 1, 2
    assert run(values(tiny_checkpoint("sd15"), make_lora(), tmp_path, count=3, steps=1), SilentProgress(), second) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dog_1.png"]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("prompt", " ", "sample.prompt must be a text"),
        ("width", 100, "sample.width must be a multiple of 8"),
        ("reward_scale", -2, "sample.reward_scale must be 0 or more, or -1"),
        ("steps", 0, "sample.steps must be between 1 and 1000"),
        ("text_scale", "high", "sample.text_scale must be of type float"),
        ("colour", 1, "unknown setting"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(key, value, sentence, tiny_checkpoint, tmp_path):
    given = values(tiny_checkpoint("sd15"), tmp_path / "none.safetensors", tmp_path, **{key: value})
    with pytest.raises(ConfigError, match=sentence):
        run(given, SilentProgress(), Ranks())


def test_the_command_line_reads_the_example(tiny_checkpoint, make_lora, tmp_path, capsys, monkeypatch):
    from comfyui_personalize.trainers.dco import sample

    example = sample.__file__.replace("sample.py", "sample.example.toml")
    words = ["dco-sample", "--config", example, "device=cpu", f"base.path={tiny_checkpoint('sd15')}"]
    words += [f"lora.path={make_lora()}", f"output.folder={tmp_path}", "sample.steps=1", "sample.count=1"]
    assert main([*words, "sample.width=64", "sample.height=64"]) == 0
    assert f"saved {tmp_path / 'my_dog_0.png'}" in capsys.readouterr().out
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
