"""What users get wrong with a face encoder's training: pictures, files, weights, and when they cancel."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from comfyui_personalize.models.errors import (
    ConfigError,
    DatasetError,
    FormatError,
    IncompatibleModelError,
    TrainingError,
)
from comfyui_personalize.models.lora import LowRankDelta, kohya_tensors
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.lookahead.config import DenoisingTerm, PictureTerm
from comfyui_personalize.trainers.lookahead.data import FaceDataSettings, FaceSet
from comfyui_personalize.trainers.lookahead.objective import Objective
from comfyui_personalize.trainers.lookahead.pictures import PictureReader
from comfyui_personalize.trainers.lookahead.sampling import PersonSampler
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.text import PromptEncoder

HUGE = DenoisingTerm(name="noise", weight=1e300)


class CancelWhen(SilentProgress):
    """The user cancels when a message says so."""

    def __init__(self, part):
        self.part, self.flag, self.messages = part, False, []

    def report(self, step, total, message="", preview=None):
        self.messages.append(message)
        self.flag = self.flag or self.part in message

    def cancelled(self):
        return self.flag


@pytest.fixture
def damaged(people, tmp_path):
    """The people with one picture cut short, one that is no picture, one missing, and a person with a single one."""
    folder = tmp_path / "damaged"
    shutil.copytree(people, folder)
    names = json.loads((folder / "metadata.json").read_text())
    whole = (folder / "bob/vanilla/A_photo_of_conceptname_3.png").read_bytes()
    (folder / "bob/vanilla/A_photo_of_conceptname_3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bob/vanilla/A_photo_of_conceptname_4.png").write_text("no picture")
    (folder / "bob/stylized/A_drawing_of_conceptname_5.png").unlink()
    shutil.copy(folder / "ann/vanilla/A_photo_of_conceptname_1.png", folder / "A_photo_of_conceptname_6.png")
    (folder / "metadata.json").write_text(json.dumps(names | {"A_photo_of_conceptname_6.png": "eve"}))
    return FaceDataSettings(sets=(FaceSet(folder=folder, metadata=folder / "metadata.json", prompt_in_filename=True),))


def test_pictures_that_cannot_be_read_are_left_out_counted_and_named(tiny, damaged):
    with pytest.warns(UserWarning, match="left out of the training") as warned:
        result = tiny.train(damaged.open(), steps=3, batch_size=5)
    assert result.train.steps == 3
    named = [str(one.message) for one in warned if "left out of the training" in str(one.message)]
    assert len(named) == len(set(named)) == 2  # each once
    told = result.train.summary
    assert "2 pictures could not be read" in told and "A_photo_of_conceptname_4.png" in told
    assert "1 pictures of the metadata are not there (bob/stylized/A_drawing_of_conceptname_5.png)" in told
    assert "1 people have a single picture" in told


def test_a_set_without_a_picture_that_can_be_read_is_refused(tiny, damaged, tmp_path):
    for path in (tmp_path / "damaged").rglob("*.png"):
        path.write_text("no picture")
    with pytest.warns(UserWarning), pytest.raises(DatasetError, match="no picture with a reference could be read"):
        tiny.train(damaged.open(), steps=1)
    assert not [*(tiny.folder / "out").rglob("*.safetensors")]


@pytest.fixture
def no_unet(monkeypatch):
    """Loading the UNet fails the test."""

    def load(*_):
        raise AssertionError("the UNet was loaded")

    monkeypatch.setattr(TrainingBase, "load_unet", load)


def test_an_lcm_lora_of_another_family_is_refused_before_the_unet_is_loaded(tiny, no_unet, tmp_path):
    path = tmp_path / "lcm.safetensors"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # SDXL has no attention there
    save_file(kohya_tensors({name: LowRankDelta(torch.ones(1, 320), torch.ones(320, 1))}, "sd15"), path)
    with pytest.raises(IncompatibleModelError, match="choose the LCM LoRA for SDXL"):
        tiny.train(models={"lcm_lora": path})
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{stem}.lora_down.weight": torch.ones(1, 8), f"{stem}.lora_up.weight": torch.ones(8, 1)}, path)
    with pytest.raises(FormatError, match="holds no LoRA of a UNet"):
        tiny.train(models={"lcm_lora": path})


def test_another_face_network_is_refused_before_the_unet_is_loaded(tiny, no_unet, faces, tmp_path):
    folder = faces.write_face_models(tmp_path / "insightface", recogniser=False)
    wrong = {"face_models": folder, "face_network": tiny.models.lcm_lora}
    with pytest.raises(FormatError, match="no IR-SE50 face network"):
        tiny.train(models=wrong, picture_losses=(PictureTerm(name="identity"),))
    with pytest.raises(ConfigError, match=r"models\.face_network is needed"):
        tiny.train(models=wrong | {"face_network": None}, picture_losses=(PictureTerm(name="identity"),))


def test_a_batch_without_any_face_trains_on(tiny, monkeypatch, faces, tmp_path):
    monkeypatch.setattr(PictureReader, "landmarks", lambda self, pixels: None)
    folder = faces.write_face_models(tmp_path / "insightface", recogniser=False)
    result = tiny.train(steps=2, models={"face_models": folder}, picture_losses=(PictureTerm(name="identity"),))
    assert result.train.losses[1] == 0.0 and result.train.steps == 2


def test_weights_beyond_all_numbers_end_the_training_with_the_last_good_encoder(tiny):
    result = tiny.train(steps=4, picture_losses=(PictureTerm(name="image_l1", weight=1e38),))
    assert result.train.stopped_by == "nan" and result.train.steps == 1 and len(result.files) == 1
    with pytest.raises(TrainingError, match="first loss is not a number"):
        tiny.train(name="first", denoising_losses=(HUGE,), steps=2)
    assert not tiny.place("first").lora_path.exists()


@pytest.mark.parametrize("part", ["encoding prompts", "loading the losses", "loading the UNet", "training"])
def test_cancel_between_the_models_leaves_nothing(part, tiny):
    progress = CancelWhen(part)
    result = tiny.train(progress=progress, steps=2)
    assert result.train.stopped_by == "cancelled" and result.files == () and result.train.steps == 0
    assert not (tiny.folder / "out").exists()


def test_cancel_among_many_prompts_encodes_no_more_of_them(tiny, monkeypatch):
    progress, encode, encoded = SilentProgress(), PromptEncoder.encode, []

    def watched(self, prompts):
        encoded.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(PromptEncoder, "encode", watched)
    monkeypatch.setattr(progress, "cancelled", lambda: bool(encoded))
    data = tiny.data(drawn={"validation_prompts": tuple(f"a face on day {day}" for day in range(30))})
    assert tiny.train(data, progress=progress).train.stopped_by == "cancelled"
    assert 0 < len(encoded) <= 8


def test_cancel_while_a_grid_is_sampled_saves_what_was_learned(tiny, monkeypatch):
    progress, sample, sampled = CancelWhen("never said"), PersonSampler.sample, []

    def watched(self, *arguments, **told):
        progress.flag = True
        sampled.append(sample(self, *arguments, **told))
        return sampled[-1]

    monkeypatch.setattr(PersonSampler, "sample", watched)
    result = tiny.train(progress=progress, steps=3, preview_every=1, preview_people=1, preview_steps=2)
    assert sampled == [None] and result.preview is None
    assert result.train.stopped_by == "cancelled" and result.train.steps == 1 and len(result.files) == 1


def test_cancel_within_an_evaluation_saves_what_was_learned(tiny, monkeypatch):
    progress, ahead, evaluated = CancelWhen("never said"), Objective.ahead, []

    def watched(self, batch, *arguments, **told):
        if told:  # what an evaluation says of faceless previews
            evaluated.append(batch)
            progress.flag = len(evaluated) == 4  # the first of three passes after the first step
        return ahead(self, batch, *arguments, **told)

    monkeypatch.setattr(Objective, "ahead", watched)
    result = tiny.train(progress=progress, steps=3, evaluate_every=1, evaluation_pairs=3)
    assert len(evaluated) == 4
    assert result.train.stopped_by == "cancelled" and result.train.steps == 1 and len(result.files) == 1


def test_a_run_with_other_losses_is_not_resumed(tiny):
    tiny.train(progress=CancelWhen("loss "))
    with pytest.raises(ConfigError, match="other settings"):
        tiny.train(resume=True, picture_losses=(PictureTerm(name="image_l1"), PictureTerm(name="identity")),
                   models={"face_models": tiny.folder})  # fmt: skip
