"""Settings, data, turns and the start of a face encoder's training, without training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, DatasetError, FormatError
from comfyui_personalize.models.lookahead.encoder import encoder_tensors
from comfyui_personalize.models.lookahead.encoder_parts import last_block
from comfyui_personalize.trainers.clip_vision import clip_pictures, load_clip_vision
from comfyui_personalize.trainers.config import build, read_toml
from comfyui_personalize.trainers.lookahead import config as settings
from comfyui_personalize.trainers.lookahead.config import LookaheadConfig, LookaheadRun, PictureTerm
from comfyui_personalize.trainers.lookahead.data import FaceDataSettings, FaceSet, read_metadata
from comfyui_personalize.trainers.lookahead.iterations import Iterations
from comfyui_personalize.trainers.lookahead.pictures import augmented
from comfyui_personalize.trainers.lookahead.starting import start_encoder
from comfyui_personalize.trainers.ranks import Ranks

FOLDER = Path(settings.__file__).parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Settings


@pytest.mark.parametrize("name", ["example", "multi_set.example", "celeba.example"])
def test_the_examples_are_whole(name):
    run = build(LookaheadRun, read_toml(FOLDER / f"{name}.toml"))
    assert run.train == LookaheadConfig()
    assert len(run.data.sets) == (3 if name.startswith("multi") else 1)


def test_the_example_has_every_setting_that_this_recipe_knows():
    values = read_toml(FOLDER / "example.toml")
    unknown_here = {
        "snr_gamma", "offset_noise", "crop_variants", "flip", "bundle_tokens", "preview_prompt", "preview_guidance",
    }  # fmt: skip
    assert values["train"].keys() == LookaheadConfig.__dataclass_fields__.keys() - unknown_here
    assert values["data"].keys() == FaceDataSettings.__dataclass_fields__.keys() - {"validation"}
    assert values["data"]["sets"][0].keys() == FaceSet.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kv_drop_chance": 1.5}, "kv_drop_chance"),
        ({"lookahead_every": 2, "lcm_scale_every": 5}, "lcm_scale_every"),
        ({"lcm_min_scale": 0.0}, "lcm_min_scale"),
        ({"picture_losses": ()}, "picture_losses"),
        ({"keep": "best"}, "keep"),
        ({"flip": True}, "flip"),
        ({"snr_gamma": 5.0}, "snr_gamma"),
        ({"lookahead_batch_size": 0}, "lookahead_batch_size"),
        ({"picture_losses": (PictureTerm(name="clip"),) * 2}, "losses of different names"),
    ],
)
def test_settings_are_refused_by_name(wrong, named):
    with pytest.raises(ConfigError, match=named):
        LookaheadConfig(**wrong)


def test_a_loss_of_another_name_is_refused():
    with pytest.raises(ConfigError, match="name must be one of noise, weighted_noise"):
        build(LookaheadConfig, {"denoising_losses": [{"name": "huber"}]})


def test_a_loss_with_a_weight_that_is_none_is_refused():
    for weight in (float("nan"), float("inf"), -1.0, "1"):
        with pytest.raises(ConfigError, match="loss"):
            PictureTerm(name="identity", weight=weight)
    with pytest.raises(ConfigError, match="loss name must be one of identity"):
        PictureTerm(name="huber")


def test_what_is_shown_and_evaluated_does_not_change_a_run():
    plain = LookaheadConfig()
    watched = LookaheadConfig(evaluate_every=5, keep="best", preview_every=2, preview_people=4, preview_steps=3)
    assert plain.resume_fingerprint(9) == watched.resume_fingerprint(9)
    assert plain.resume_fingerprint(9) == LookaheadConfig(cache_gigabytes=0.5).resume_fingerprint(9)
    more = LookaheadConfig(picture_losses=(*plain.picture_losses, PictureTerm(name="image_l1")))
    assert plain.resume_fingerprint(9) != more.resume_fingerprint(9)


def test_missing_models_are_named(tiny):
    with pytest.raises(ConfigError, match="models.face_models"):
        tiny.models.check(LookaheadConfig(), crop_heads=False)
    with pytest.raises(ConfigError, match="models.vgg"):
        tiny.models.check(build(LookaheadConfig, {"picture_losses": [{"name": "lpips"}]}), crop_heads=False)
    tiny.models.check(LookaheadConfig(lookahead_every=0), crop_heads=False)


def test_models_are_the_same_wherever_they_lie_and_others_when_they_hold_something_else(models, tmp_path):
    copied = replace(
        models,
        start=shutil.copy(models.start, tmp_path / "renamed.safetensors"),
        clip_vision=shutil.copytree(models.clip_vision, tmp_path / "vision"),
    )
    assert copied.fingerprint == models.fingerprint
    assert replace(models, preview_vae=models.clip_vision).fingerprint != models.fingerprint
    with (copied.clip_vision / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read()
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert copied.fingerprint != models.fingerprint


# Data


def test_balanced_draws_meet_sets_by_weight(tiny, people):
    alone = people / "ann"
    sets = (FaceSet(folder=people, weight=1.0), FaceSet(folder=alone, weight=3.0))
    data = FaceDataSettings(sets=sets, balance=True).open()
    chances = data.chances()
    assert len(chances) == len(data) == 7
    assert chances[:5].tolist() == pytest.approx([0.25 / 5] * 5) and chances[5:].tolist() == pytest.approx(
        [0.75 / 2] * 2
    )
    assert data.pair(6, generator()).target.path.is_relative_to(alone)


def test_a_pair_shows_one_person(tiny):
    data, draws = tiny.data(only_vanilla_references=True), generator()
    for index in list(range(len(data))) * 5:
        pair = data.pair(index, draws)
        assert pair.target.identity == pair.reference.identity and "vanilla" in pair.reference.name
        assert {pair.prompt, pair.reference_prompt} <= set(data.prompts())


def test_data_that_cannot_be_is_refused(tmp_path, people):
    with pytest.raises(DatasetError, match="no such folder"):
        FaceDataSettings(sets=(FaceSet(folder=tmp_path / "none"),)).open()
    with pytest.raises(DatasetError, match="none of 0 pictures"):
        FaceDataSettings(sets=(FaceSet(folder=tmp_path),)).open()
    with pytest.raises(ConfigError, match="has no sets"):
        FaceDataSettings(sets=())
    path = tmp_path / "metadata.json"
    for text, message in (
        ("[1]", "one JSON table"),
        ("{", "cannot be read"),
        (json.dumps({"../secret.png": "x"}), "leads out"),
        (json.dumps({"/etc/x.png": "x"}), "leads out"),
        (json.dumps({"C:\\x.png": "x"}), "leads out"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=message):
            read_metadata(path)


def test_missing_pictures_are_counted_and_the_first_named(tiny, people, tmp_path):
    names = json.loads((people / "metadata.json").read_text())
    gone = {f"eve/{number}.png": "eve" for number in range(5)} | {f"{'long' * 100}.png": "eve"}
    path = tmp_path / "more.json"
    path.write_text(json.dumps(names | gone))
    (said,) = tiny.data(metadata=path).remarks()
    assert said.endswith(
        "6 pictures of the metadata are not there (eve/0.png, eve/1.png, eve/2.png, eve/3.png, eve/4.png, …)"
    )
    strangers = FaceSet(folder=people, metadata=path)
    assert tiny.data(drawn={"validation": strangers}).remarks() == [said]


def test_the_fingerprint_knows_what_decides(tiny):
    same, other = tiny.data().fingerprint, tiny.data(only_vanilla_references=True).fingerprint
    assert tiny.data().fingerprint == same != other
    assert tiny.data(drawn={"random_target_chance": 0.5}).fingerprint != same


def test_augmented_references_keep_their_size():
    pixels = torch.rand(3, 32, 32, generator=generator()) * 2 - 1
    first, again, other = (augmented(pixels, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == pixels.shape and torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1


# Turns


def turns(config, data, count, state=None):
    draws = generator(config.seed)
    iterations = Iterations(config, data, draws, Ranks())
    if state is not None:
        draws.set_state(state[0])
        iterations.load_state_dict(json.loads(state[1]))
    made = [iterations.next() for _ in range(count)]
    return made, (draws.get_state(), json.dumps(iterations.state_dict()))


def test_the_halves_take_turns_and_share_their_batch(tiny):
    config = LookaheadConfig(lookahead_every=3, lcm_scale_every=6, batch_size=2, lcm_full_chance=0.0)
    made, _ = turns(config, tiny.data(), 16)
    assert [turn.ahead for turn in made] == [False, True, False, False] * 4
    for before, ahead in zip(made[::4], made[1::4]):
        assert (before.indices, before.seed) == (ahead.indices, ahead.seed)
        assert before.rows_generator().get_state().equal(ahead.rows_generator().get_state())
        assert not before.half_generator().get_state().equal(ahead.half_generator().get_state())
    strengths = [turn.strength for turn in made[1::4]]  # iterations 0, 3, 6 and 9
    assert strengths[0] == strengths[1] != strengths[2] == strengths[3]
    assert all(0.1 <= strength < 1 for strength in strengths)


def test_accumulated_passes_are_of_one_kind(tiny):
    made, _ = turns(LookaheadConfig(gradient_accumulation=2, batch_size=1), tiny.data(), 8)
    assert [turn.ahead for turn in made] == [False, False, True, True] * 2
    assert [turn.seed for turn in made[:2]] == [turn.seed for turn in made[2:4]]
    assert made[0].seed != made[1].seed


def test_full_strength_and_no_lookahead(tiny):
    made, _ = turns(LookaheadConfig(lcm_full_chance=1.0), tiny.data(), 20)
    assert {turn.strength for turn in made} == {1.0}
    made, _ = turns(LookaheadConfig(lookahead_every=0), tiny.data(), 5)
    assert not any(turn.ahead for turn in made)


@pytest.mark.parametrize("balance", [False, True])
def test_turns_continue_from_any_state(balance, tiny):
    data = tiny.data(drawn={"balance": balance})
    config = LookaheadConfig(gradient_accumulation=2, lookahead_every=2, lcm_scale_every=2, batch_size=3)
    whole, _ = turns(config, data, 15)
    for cut in (1, 2, 3, 7):
        _, state = turns(config, data, cut)
        assert turns(config, data, 15 - cut, state)[0] == whole[cut:]
    iterations = Iterations(config, data, generator(config.seed), Ranks())
    assert [turn for _ in whole for turn in (iterations.peek(), iterations.peek(), iterations.next())] == [
        turn for turn in whole for _ in range(3)
    ]


# Where training starts


def test_an_adapter_file_gets_changes_that_change_nothing_yet(tiny):
    unet = tiny.base().load_unet()
    encoder = start_encoder(tiny.models.start, unet, lora_rank=3, copy_rank=2, generator=generator())
    last = last_block(encoder.copies)
    assert last.startswith("up_blocks.") and not any(name.startswith(last) for name in encoder.lora)
    assert len(encoder.lora) == 8 * (len(encoder.copies) - 1)
    assert {delta.rank for delta in encoder.lora.values()} == {3}
    changes = [*encoder.lora.values(), *(delta for pair in encoder.copies.values() for delta in pair)]
    assert all(not delta.up.any() and delta.down.any() for delta in changes)

    full = start_encoder(tiny.models.start, unet, lora_rank=0, copy_rank=0, generator=generator())
    assert full.lora == {} and full.trained
    block, (keys, _) = next(iter(full.copies.items()))
    torch.testing.assert_close(keys, unet.get_submodule(f"{block}.attn1.to_k").weight.float())


def test_a_trained_encoder_is_taken_as_it_is(tiny, load_helper):
    path = load_helper("tiny/lookahead.py").write_slim(tiny.folder / "earlier.safetensors", "sdxl", rank=2)
    unet = tiny.base().load_unet()
    encoder = start_encoder(path, unet, lora_rank=7, copy_rank=7, generator=generator())
    assert {delta.rank for delta in encoder.lora.values()} == {2}
    assert len(encoder_tensors(encoder)) > 0


@pytest.mark.parametrize(
    ("blocks", "last"),
    [
        (("down_blocks.1.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.3"), 1),
        (("up_blocks.1.attentions.2.transformer_blocks.1", "up_blocks.0.attentions.2.transformer_blocks.9"), 0),
        (("up_blocks.0.attentions.0.transformer_blocks.10", "up_blocks.0.attentions.0.transformer_blocks.9"), 0),
    ],
)
def test_the_last_block(blocks, last):
    assert last_block(dict.fromkeys(blocks)) == blocks[last]


# CLIP-Vision


def test_pictures_for_clip_are_as_its_processor_makes_them():
    from transformers import CLIPImageProcessorPil

    pictures = torch.rand(2, 3, 40, 50, generator=generator()) * 2 - 1
    levels = ((pictures / 2 + 0.5) * 255).round().to(torch.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(list(levels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip_pictures(pictures, 32), expected, rtol=0, atol=0.02)


def test_clip_vision_files_that_are_something_else(tiny, tmp_path):
    with pytest.raises(FormatError, match="no such CLIP-Vision"):
        load_clip_vision(tmp_path / "none.safetensors", torch.float32, "cpu")
    with pytest.raises(FormatError, match=r"no config\.json"):
        load_clip_vision(tmp_path, torch.float32, "cpu")
    with pytest.raises(FormatError, match="no CLIP-Vision model"):
        load_clip_vision(tiny.models.lcm_lora, torch.float32, "cpu")
