"""Encoders exported for the authors' code from the command line, and read back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError
from comfyui_personalize.models.lookahead.encoder import encoder_tensors, read_encoder, write_encoder
from comfyui_personalize.models.lookahead.word import WordHead
from comfyui_personalize.trainers.__main__ import main
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.config import build, read_toml
from comfyui_personalize.trainers.lookahead import export as recipe
from comfyui_personalize.trainers.lookahead.export import ExportRun, export


@pytest.fixture
def encoder(tiny, load_helper):
    """A slim file with LoRAs of rank 3."""
    return load_helper("tiny/lookahead.py").write_slim(tiny.folder / "mine.safetensors", "sdxl", rank=3)


def test_the_command_line(tiny, encoder, capsys):
    config = tiny.folder / "export.toml"
    values = {
        "encoder": encoder,
        "clip_vision": tiny.models.clip_vision,
        "base.path": tiny.checkpoint,
        "output.name": "model_ckpt",
        "output.folder": tiny.folder / "result",
    }
    config.write_text("\n".join(f"{name} = {json.dumps(str(value))}" for name, value in values.items()))
    assert main(["lookahead-export", "--config", str(config)]) == 0
    path = tiny.folder / "result/lookahead_encoders/model_ckpt.pt"
    said = capsys.readouterr().out
    assert str(path) in said and "--encoder_lora_rank 3 --kvcopy_lora_rank 3 --ip_adapter_tokens 4" in said
    found, expected = encoder_tensors(read_encoder(path)), encoder_tensors(read_encoder(encoder))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    tensors = torch.load(path, weights_only=True)
    own = {key.removeprefix("encoder_unet.") for key in tensors if key.startswith("encoder_unet.")}
    assert tiny.base().load_unet().state_dict().keys() <= own
    vision = {tensor.dtype for key, tensor in tensors.items() if key.startswith("image_encoder.")}
    assert vision == {torch.float16} and not any("position_ids" in key for key in tensors)
    assert main(["lookahead-export", "--config", str(config)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_predicted_word_is_left_out_and_said_so(tiny, load_helper):
    with_word = replace(load_helper("tiny/lookahead.py").make_encoder("sdxl", rank=1), word=WordHead(8, 6))
    encoder = write_encoder(tiny.folder / "word.safetensors", with_word, {})
    written = export(encoder, tiny.base(), tiny.models.clip_vision, tiny.folder / "word.pt")
    assert "what predicts a word for the person is left out" in str(written)
    roots = {"encoder_unet", "image_encoder", "image_proj_model"}
    assert {key.partition(".")[0] for key in torch.load(written.path, weights_only=True)} == roots
    assert "word" not in str(replace(written, word=False)).partition("; ")[2]


def test_what_does_not_belong_together_leaves_no_file(tiny, encoder, tiny_checkpoint, load_helper):
    path = tiny.folder / "none.pt"
    with pytest.raises(IncompatibleModelError, match="face encoders are for SDXL"):
        export(encoder, open_base(tiny_checkpoint("sd15")), tiny.models.clip_vision, path)
    other = load_helper("tiny/lookahead.py").write_slim(tiny.folder / "other.safetensors", "world_sdxl")
    with pytest.raises(IncompatibleModelError, match="transformer blocks|made for a model whose"):
        export(other, tiny.base(), tiny.models.clip_vision, path)
    path.touch()
    with pytest.raises(ConfigError, match="exists already"):
        export(encoder, tiny.base(), tiny.models.clip_vision, path)
    assert path.stat().st_size == 0


def test_the_example_is_whole():
    run = build(ExportRun, read_toml(Path(recipe.__file__).with_name("export.example.toml")))
    assert run.output.name == "model_ckpt"
