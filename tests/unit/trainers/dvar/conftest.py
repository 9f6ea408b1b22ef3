"""Real trainings of DVAR's three methods on tiny checkpoints."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.output import OutputPlace

CPU = torch.device("cpu")
DOG = LearnedToken("<dog>", "dog")
SETTINGS = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "resolution": 64, "precision": "fp32", "flip": False}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folders of three pictures: of the subject, and of its class."""
    folders = []
    for name, colour in (("dog", 90), ("class", 210)):
        folders.append(tmp_path_factory.mktemp("pictures") / name)
        folders[-1].mkdir()
        for index in range(3):
            picture = Image.new("RGB", (72 + 8 * index, 80), (60 * index, colour, 200 - 40 * index))
            ImageDraw.Draw(picture).ellipse((12 + index, 10, 60, 56), fill=(240, 30, 40 * index))
            picture.save(folders[-1] / f"{index}.png")
    return folders


@pytest.fixture
def tiny(tiny_checkpoint, pictures, tmp_path):
    """A workplace for trainings of this test."""
    return Workplace(tiny_checkpoint, pictures, tmp_path)


class Workplace:
    """Trains on tiny checkpoints; files go below the test's own folder."""

    def __init__(self, checkpoint, pictures: list[Path], folder: Path):
        self._checkpoint, self._pictures, self.folder = checkpoint, pictures, folder

    def base(self, family="sd15"):
        return open_base(self._checkpoint(family))

    def dataset(self, *tokens, class_caption=None, captions=None):
        """The three pictures; with ``class_caption`` also those of the class."""
        captions = captions or " and ".join(token.trigger for token in tokens) or "a dog"
        dataset = Dataset.from_folder(self._pictures[0], tokens=tokens, captions=captions, base_captions="a dog")
        return dataset.with_class_folder(self._pictures[1], class_caption) if class_caption else dataset

    def place(self, name="my_dog", *, overwrite=False):
        out = self.folder / "out"
        return OutputPlace(name, out / "main", out / "embeddings", out / "runs" / name, overwrite=overwrite)

    def train(self, recipe, config, family="sd15", dataset=None, *, name="my_dog", **more):
        """Train with the small settings above, changed by ``more``; its surroundings may be among them."""
        around = {key: more.pop(key) for key in ("progress", "stopping", "ranks") if key in more}
        settings = config(**SETTINGS | more)
        dataset = dataset or self.dataset(DOG)
        return recipe.train(settings, self.base(family), dataset, self.place(name), device=CPU, **around)
