"""Real DCO trainings on tiny checkpoints: a few pictures, a few steps, and a look at what happens inside."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers import loop, text_side
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.dco import train
from comfyui_personalize.trainers.dco.config import DCOConfig
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.text_side import TextSide

CPU = torch.device("cpu")
DOG = LearnedToken("<dog>", "dog")
SETTINGS = {
    "steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-3,
    "resolution": 64,
    "crop": "center",
    "rank": 4,
    "beta": 10.0,
    "precision": "fp32",
    "save_precision": "fp32",
}


def draw_pictures(folder: Path, count: int, colour: int) -> list[Path]:
    """Small pictures of several shapes, no two alike."""
    folder.mkdir(parents=True)
    paths = []
    for index in range(count):
        picture = Image.new("RGB", (80 + 10 * index, 72), (40 * index, colour, 200 - 30 * index))
        ImageDraw.Draw(picture).ellipse((10 + index, 10, 50, 50), fill=(250, 20, 30 * index))
        paths.append(folder / f"{index}.png")
        picture.save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of four pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "dog"
    draw_pictures(folder, 4, 100)
    return folder


@pytest.fixture(scope="session")
def class_pictures(tmp_path_factory):
    """Folder of three pictures of the class."""
    folder = tmp_path_factory.mktemp("pictures") / "class"
    draw_pictures(folder, 3, 220)
    return folder


@dataclass(repr=False)
class Inside:
    """What a training did, recorded on the way."""

    unet: list[torch.nn.Module] = field(default_factory=list)
    encoders: list[torch.nn.Module] = field(default_factory=list)
    lora: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Starting values of each LoRA, in the order they were attached."""
    batches: list = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Gradient norm of every step before clipping."""
    encoded: int = 0
    """Pictures that went through the autoencoder."""
    text: list[TextSide] = field(default_factory=list)


@pytest.fixture
def inside(monkeypatch):
    """Record the insides of every training in this test."""
    seen = Inside()
    load_unet, load_encoders, add = TrainingBase.load_unet, TrainingBase.load_text_encoders, train.add_lora
    following, clip, load_vae = LatentBatches.next, loop.clip_gradients, TrainingBase.load_vae

    def keep(place, value):
        place.append(value)
        return value

    def add_lora(*arguments):
        parameters = add(*arguments)
        seen.lora.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
        return parameters

    def clip_gradients(*arguments):
        norm = clip(*arguments)
        seen.norms.append(float(norm))
        return norm

    def counting_vae(*arguments):
        vae = load_vae(*arguments)
        encode = vae.encode_moments

        def encode_moments(images):
            seen.encoded += len(images)
            return encode(images)

        vae.encode_moments = encode_moments
        return vae

    def load_text_encoders(*arguments):
        encoders = load_encoders(*arguments)
        seen.encoders.extend(encoders)
        return encoders

    monkeypatch.setattr(TrainingBase, "load_unet", lambda *a: keep(seen.unet, load_unet(*a)))
    monkeypatch.setattr(TrainingBase, "load_text_encoders", load_text_encoders)
    monkeypatch.setattr(TrainingBase, "load_vae", counting_vae)
    monkeypatch.setattr(LatentBatches, "next", lambda self: keep(seen.batches, following(self)))
    monkeypatch.setattr(train, "TextSide", lambda *a, **k: keep(seen.text, TextSide(*a, **k)))
    monkeypatch.setattr(train, "add_lora", add_lora)
    monkeypatch.setattr(text_side, "add_lora", add_lora)
    monkeypatch.setattr(loop, "clip_gradients", clip_gradients)
    return seen


@pytest.fixture
def tiny(tiny_checkpoint, pictures, tmp_path):
    """A workplace for trainings of this test."""
    return Workplace(tiny_checkpoint, pictures, tmp_path)


class Workplace:
    """Trains on tiny checkpoints; files go below the test's own folder."""

    def __init__(self, checkpoint, pictures: Path, folder: Path):
        self._checkpoint, self._pictures, self.folder = checkpoint, pictures, folder

    def base(self, family: str = "sd15") -> TrainingBase:
        return open_base(self._checkpoint(family))

    def dataset(self, *tokens: LearnedToken, captions=None, **arguments) -> Dataset:
        """The four pictures; captions name the tokens, or a dog where there are none."""
        names = " and ".join(token.trigger for token in tokens) or "dog"
        captions = captions or [f"a {names} photo number {number}" for number in range(4)]
        return Dataset.from_folder(self._pictures, tokens=tokens, captions=captions, **arguments)

    def place(self, name: str = "my_dog", *, overwrite: bool = False) -> OutputPlace:
        folder = self.folder / "out"
        return OutputPlace(name, folder / "loras", folder / "embeddings", folder / "runs" / name, overwrite=overwrite)

    def train(
        self, family="sd15", dataset=None, *, name="my_dog", progress=None, overwrite=False, stopping=None, **settings
    ):
        """Train with the small settings above, changed by ``settings``."""
        return train.train(
            DCOConfig(**SETTINGS | settings),
            self.base(family),
            dataset or self.dataset(DOG),
            self.place(name, overwrite=overwrite),
            device=CPU,
            progress=progress,
            stopping=stopping,
        )


@pytest.fixture
def dog():
    """A token that starts from a word."""
    return DOG
