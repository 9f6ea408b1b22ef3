"""Real trainings of a face encoder on a tiny SDXL: drawn faces, a few steps, and a look at what happens inside."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_personalize.models.lookahead.arcface import ArcFace
from comfyui_personalize.models.lora import LowRankDelta, kohya_tensors
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.lookahead import train
from comfyui_personalize.trainers.lookahead.config import (
    DenoisingTerm,
    LookaheadConfig,
    LookaheadModels,
    PictureTerm,
)
from comfyui_personalize.trainers.lookahead.data import FaceData, FaceDataSettings, FaceSet
from comfyui_personalize.trainers.output import OutputPlace

CPU = torch.device("cpu")
SIDE = 64
SETTINGS = {
    "steps": 4,
    "batch_size": 2,
    "lookahead_batch_size": 1,
    "learning_rate": 1e-3,
    "adapter_learning_rate": 1e-3,
    "resolution": SIDE,
    "crop": "center",
    "gradient_checkpointing": False,
    "precision": "fp32",
    "save_precision": "fp32",
    "picture_losses": (PictureTerm(name="image_l1"),),
}
FILES = {
    "ann/vanilla/A_photo_of_conceptname_1.png": "ann",
    "ann/stylized/An_oil_painting_of_conceptname_2.png": "ann",
    "bob/vanilla/A_photo_of_conceptname_3.png": "bob",
    "bob/vanilla/A_photo_of_conceptname_4.png": "bob",
    "bob/stylized/A_drawing_of_conceptname_5.png": "bob",
}


@pytest.fixture(scope="session")
def faces(load_helper):
    """The helper that draws faces and writes networks which find them."""
    return load_helper("tiny/faces.py")


@pytest.fixture(scope="session")
def people(tmp_path_factory, faces) -> Path:
    """Folder of five pictures of two people, with metadata.json."""
    folder = tmp_path_factory.mktemp("people")
    for index, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        drawn = faces.draw(96, 96, faces.Drawn(44 + 2 * index, 48, 40 + 4 * index))
        Image.fromarray(drawn).save(folder / name)
    (folder / "metadata.json").write_text(json.dumps(FILES))
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_checkpoint, load_helper) -> LookaheadModels:
    """An ip-adapter-plus file for the tiny SDXL, an image encoder, an LCM LoRA and a face network."""
    folder = tmp_path_factory.mktemp("models")
    tiny = load_helper("tiny/lookahead.py")
    encoder = tiny.make_encoder("sdxl", rank=0)
    unet = open_base(tiny_checkpoint("sdxl")).load_unet()
    blocks = [name.removesuffix(".attn2") for name, _ in unet.named_modules() if name.endswith(".attn2")]
    start = {f"image_proj.{name}": value for name, value in encoder.resampler.state_dict().items()}
    for number, block in enumerate(blocks):
        pair = zip(("to_k", "to_v"), encoder.adapter[block])
        start |= {f"ip_adapter.{2 * number + 1}.{which}_ip.weight": weight for which, weight in pair}
    save_file(start, folder / "ip-adapter-plus.safetensors")

    vision = tiny.write_clip_vision(folder / "image_encoder" / "model.safetensors")
    (vision.parent / "config.json").write_text(json.dumps(tiny.CLIP_VISION_SIZES))

    generator = torch.Generator().manual_seed(5)
    name = f"{blocks[0]}.attn1.to_q"
    outputs, inputs = unet.get_submodule(name).weight.shape
    delta = LowRankDelta(
        torch.randn(2, inputs, generator=generator), 0.1 * torch.randn(outputs, 2, generator=generator)
    )
    save_file(kohya_tensors({f"unet.{name}": delta}, "sdxl"), folder / "lcm.safetensors")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ArcFace([(8, 8, 2, 2, False), (8, 16, 4, 2, True)], 12, 28)
    torch.save(network.state_dict(), folder / "ir_se.pth")
    return LookaheadModels(
        start=folder / "ip-adapter-plus.safetensors",
        clip_vision=vision.parent,
        lcm_lora=folder / "lcm.safetensors",
        face_network=folder / "ir_se.pth",
    )


class Workplace:
    """Trains on the tiny SDXL; files go below the test's own folder."""

    def __init__(self, checkpoint: Path, people: Path, models: LookaheadModels, folder: Path):
        self.checkpoint, self.people, self.models, self.folder = checkpoint, people, models, folder

    def base(self) -> TrainingBase:
        return open_base(self.checkpoint)

    def data(self, *, sets: int = 1, drawn: dict | None = None, **settings) -> FaceData:
        told = {"folder": self.people, "metadata": self.people / "metadata.json", "prompt_in_filename": True}
        return FaceDataSettings(sets=(FaceSet(**told | settings),) * sets, **drawn or {}).open()

    def place(self, name: str = "face", *, overwrite: bool = False) -> OutputPlace:
        folder = self.folder / "out"
        return OutputPlace(
            name, folder / "encoders", folder / "embeddings", folder / "runs" / name, overwrite=overwrite
        )

    def train(self, data=None, *, name="face", progress=None, overwrite=False, models=None, **settings):
        """Train with the small settings above, changed by ``settings``."""
        return train.train(
            LookaheadConfig(**SETTINGS | settings),
            self.base(),
            replace(self.models, **models or {}),
            data or self.data(),
            self.place(name, overwrite=overwrite),
            device=CPU,
            progress=progress,
        )


@pytest.fixture
def tiny(tiny_checkpoint, people, models, tmp_path) -> Workplace:
    """A workplace for trainings of this test."""
    return Workplace(tiny_checkpoint("sdxl"), people, models, tmp_path)


@pytest.fixture
def weighted_noise():
    """The term that leaves out rows without a face."""
    return (DenoisingTerm(name="weighted_noise"),)
