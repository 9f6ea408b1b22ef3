"""Face encoder training on a tiny SDXL, from pictures to the file."""

import json
import math
import threading

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError, TrainingError
from comfyui_personalize.models.formats import FORMAT_KEY, read_header
from comfyui_personalize.models.lookahead.encoder import FORMAT, encoder_tensors, read_encoder
from comfyui_personalize.trainers import loop
from comfyui_personalize.trainers.__main__ import main
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.checkpoint import newest_states
from comfyui_personalize.trainers.lookahead import objective
from comfyui_personalize.trainers.lookahead.batch import Batches
from comfyui_personalize.trainers.lookahead.config import PictureTerm
from comfyui_personalize.trainers.lookahead.pictures import PictureReader
from comfyui_personalize.trainers.lookahead.starting import start_encoder
from comfyui_personalize.trainers.progress import SilentProgress


class CancelAfter(SilentProgress):
    """The user cancels when a message starts so at this step."""

    def __init__(self, step):
        self.step, self.flag = step, False

    def report(self, step, total, message="", preview=None):
        self.flag = self.flag or (message.startswith("loss") and step == self.step)

    def cancelled(self):
        return self.flag


def started(tiny):
    """The tensors that a training with seed 0 and ranks 4 starts from."""
    unet = tiny.base().load_unet()
    draws = torch.Generator().manual_seed(0)
    return encoder_tensors(
        start_encoder(tiny.models.start, unet, lora_rank=4, copy_rank=4, generator=draws), torch.float32
    )


def test_an_encoder_is_trained_and_saved(tiny, monkeypatch):
    prepared = []
    denoise = objective.denoise

    def watched(*arguments, **told):
        prepared.append((len(arguments[3].latents), told["preview_scale"] > 0, told["dropped"] is None))
        return denoise(*arguments, **told)

    monkeypatch.setattr(objective, "denoise", watched)
    result = tiny.train()
    assert result.train.steps == 4 and all(math.isfinite(loss) for loss in result.train.losses)
    assert prepared == [(2, False, False), (1, True, True)] * 2  # rows, under the LCM LoRA, adapter never dropped

    (path,) = result.files
    encoder, header = read_encoder(path), read_header(path)
    assert encoder.trained and header.metadata[FORMAT_KEY] == FORMAT
    assert json.loads(header.metadata["personalize.config"])["lookahead_every"] == 1
    encoder.check_fit(
        {name.removesuffix(".weight"): value.shape for name, value in tiny.base().load_unet().state_dict().items()}
    )
    saved, before = load_file(path), started(tiny)
    assert saved.keys() == before.keys()
    assert [name for name in saved if torch.equal(saved[name], before[name])] == []  # everything learned something

    assert header.metadata["personalize.started_from"] == tiny.models.start.name
    assert result.preview is None and not [*tiny.place().run_folder.glob("preview*")]
    assert (tiny.place().run_folder / "log.jsonl").read_text().count("\n") == 4


def test_a_cancelled_run_continues_exactly(tiny):
    settings = {"text_drop_chance": 0.3, "crop": "random", "lcm_scale_every": 1, "lcm_full_chance": 0.0}
    whole = tiny.train(name="whole", **settings)
    cut = tiny.train(name="cut", progress=CancelAfter(1), **settings)  # between the halves of an iteration
    assert cut.train.stopped_by == "cancelled" and cut.train.steps == 1 and len(cut.files) == 1
    rest = tiny.train(name="cut", resume=True, **settings)
    assert rest.train.losses == whole.train.losses
    first, second = load_file(whole.files[0]), load_file(rest.files[0])
    assert all(torch.equal(first[name], second[name]) for name in first)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pictures")]


def test_the_next_pictures_are_read_while_the_device_works(tiny, monkeypatch):
    settings = {"crop": "random", "gradient_accumulation": 2, "steps": 2, "evaluate_every": 0}
    seen, cut = [], PictureReader.cut

    def watched(*arguments):
        seen.append(threading.current_thread() is threading.main_thread())
        return cut(*arguments)

    monkeypatch.setattr(PictureReader, "cut", watched)
    ahead = tiny.train(name="ahead", **settings)
    assert seen[:4] == [True] * 4 and not any(seen[4:]) and len(seen) >= 12  # the first batch's two pairs, and the rest
    monkeypatch.setattr(Batches, "expect", lambda self, turn: None)
    alone = tiny.train(name="alone", **settings)
    assert ahead.train.losses == alone.train.losses and readers() == []
    first, second = load_file(ahead.files[0]), load_file(alone.files[0])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_thread_is_left_behind(tiny, monkeypatch):
    def fails(*_arguments):
        assert readers()
        raise TrainingError("in the midst of a step")

    assert tiny.train(progress=CancelAfter(1)).train.stopped_by == "cancelled" and readers() == []
    monkeypatch.setattr(objective.Objective, "ahead", fails)
    with pytest.raises(TrainingError, match="in the midst of a step"):
        tiny.train(name="fails")
    assert readers() == []


def test_a_state_of_other_settings_is_refused(tiny):
    tiny.train(progress=CancelAfter(1), lookahead_every=0)
    assert newest_states(tiny.place().run_folder)
    with pytest.raises(ConfigError, match="other settings"):
        tiny.train(resume=True, lookahead_every=0, kv_drop_chance=0.5)


def test_gradients_are_clipped_as_the_authors_do(tiny, monkeypatch):
    clipped, clip = [], loop.clip_gradients

    def watched(parameters, max_norm):
        parameters = list(parameters)
        clipped.append((len(parameters), max_norm))
        return clip(parameters, max_norm)

    monkeypatch.setattr(loop, "clip_gradients", watched)
    tiny.train(steps=2)
    everything, encoder, again = clipped
    assert everything[1] == 0.0 and encoder[1] == again[1] == 1.0  # measured, the encoder's alone, all
    assert encoder[0] < everything[0] == again[0]
    clipped.clear()
    tiny.train(steps=2, clip="all", name="all")
    assert clipped == [again, again]


def test_faceless_previews_are_skipped_without_harm(tiny, monkeypatch, faces, tmp_path, weighted_noise):
    looked = []

    def landmarks(self, pixels):
        looked.append(pixels.shape)

    monkeypatch.setattr(PictureReader, "landmarks", landmarks)
    folder = faces.write_face_models(tmp_path / "insightface", recogniser=False)
    terms = {"picture_losses": (PictureTerm(name="identity"),), "denoising_losses": weighted_noise}
    result = tiny.train(steps=2, models={"face_models": folder}, **terms)
    assert looked == [(3, 64, 64)]
    assert result.train.losses[0] > 0 and result.train.losses[1] == 0.0


def test_the_face_of_the_preview_is_led_to_the_references(tiny, monkeypatch, faces, tmp_path):
    points = torch.tensor(faces.Drawn(32, 32, 30).landmarks, dtype=torch.float32)
    monkeypatch.setattr(PictureReader, "landmarks", lambda self, pixels: points)
    folder = faces.write_face_models(tmp_path / "insightface", recogniser=False)
    terms = (PictureTerm(name="identity"),)
    data = tiny.data(drawn={"crop_heads": True})
    result = tiny.train(data, steps=2, models={"face_models": folder}, picture_losses=terms)
    assert 0 < result.train.losses[1] < 2


def test_only_the_encoder_is_trained_where_the_adapter_is_not(tiny):
    result = tiny.train(steps=2, train_adapter=False, lookahead_every=0, models={"lcm_lora": None})
    saved, before = load_file(result.files[0]), started(tiny)
    still = {name for name in saved if torch.equal(saved[name], before[name])}
    assert all(name.startswith(("adapter.", "resampler.")) for name in still)
    assert still == {name for name in saved if name.startswith(("adapter.", "resampler."))}


def test_nothing_is_loaded_for_what_cannot_be(tiny, tiny_checkpoint, monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    for name in ("load_unet", "load_vae", "load_text_encoders"):
        monkeypatch.setattr(TrainingBase, name, load)
    with pytest.raises(ConfigError, match="models.lcm_lora"):
        tiny.train(models={"lcm_lora": None})
    with pytest.raises(ConfigError, match="lookahead_max_timestep"):
        tiny.train(lookahead_max_timestep=1001)
    monkeypatch.setattr(tiny, "base", lambda: open_base(tiny_checkpoint("sd15")))
    with pytest.raises(IncompatibleModelError, match="face encoders are for SDXL"):
        tiny.train()
    assert not (tiny.folder / "out").exists()


def test_the_command_line(tiny, capsys):
    config = tiny.folder / "run.toml"
    models = {name: str(getattr(tiny.models, name)) for name in ("start", "clip_vision", "lcm_lora")}
    lines = [
        'device = "cpu"',
        f"base = {{ path = {json.dumps(str(tiny.checkpoint))} }}",
        "[models]",
        *(f"{name} = {json.dumps(path)}" for name, path in models.items()),
        "[output]",
        'name = "cli"',
        f"folder = {json.dumps(str(tiny.folder / 'result'))}",
        "[[data.sets]]",
        f"folder = {json.dumps(str(tiny.people))}",
        "[train]",
        'steps = 2\nbatch_size = 1\nresolution = 64\nprecision = "fp32"',
        'picture_losses = [{ name = "image_l1", weight = 0.1 }]',
    ]
    config.write_text("\n".join(lines))
    assert main(["lookahead", "--config", str(config)]) == 0
    assert "saved" in capsys.readouterr().out
    assert read_encoder(tiny.folder / "result/lookahead_encoders/cli.safetensors").trained
