"""Real Perfusion trainings on tiny checkpoints: a few pictures with masks, a few steps."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from comfyui_personalize.models.perfusion import Covariance
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.perfusion import train
from comfyui_personalize.trainers.perfusion.config import PerfusionConfig

CPU = torch.device("cpu")
TEDDY = LearnedToken("<teddy>", "teddy")
SETTINGS = {
    "steps": 3,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "resolution": 64,
    "precision": "fp32",
    "save_precision": "fp32",
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of four pictures of several shapes, with masks on the disc in each."""
    folder = tmp_path_factory.mktemp("pictures") / "teddy"
    (folder / "mask").mkdir(parents=True)
    for index in range(4):
        place, size = (10 + 4 * index, 10, 46 + index, 50), (80 + 10 * index, 72)
        picture = Image.new("RGB", size, (40 * index, 100, 200 - 30 * index))
        ImageDraw.Draw(picture).ellipse(place, fill=(250, 20, 30 * index))
        picture.save(folder / f"{index}.png")
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).ellipse(place, fill=200)
        mask.save(folder / "mask" / f"{index}.png")
    return folder


@pytest.fixture
def tiny(tiny_checkpoint, pictures, tmp_path, load_helper):
    """A workplace for trainings of this test."""
    return Workplace(tiny_checkpoint, pictures, tmp_path, load_helper("tiny/perfusion.py"))


class Workplace:
    """Trains on tiny checkpoints; files go below the test's own folder."""

    def __init__(self, checkpoint, pictures: Path, folder: Path, files):
        self._checkpoint, self.pictures, self.folder, self._files = checkpoint, pictures, folder, files

    def covariance(self, family: str = "sd15", seed: int = 0) -> Covariance:
        return self._files.covariance_of(self._files.WIDTHS[family], seed)

    def base(self, family: str = "sd15") -> TrainingBase:
        return open_base(self._checkpoint(family))

    def dataset(self, *tokens: LearnedToken, masks: bool = True, **arguments) -> Dataset:
        """The four pictures, by default with TEDDY; ``masks`` False leaves the masks out."""
        tokens = tokens or (TEDDY,)
        given = {"captions": "a photo of " + " and ".join(token.trigger for token in tokens)} | arguments
        folder = None if masks else self.folder / "no masks"
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return Dataset.from_folder(self.pictures, tokens=tokens, masks=folder, **given)

    def place(self, name: str = "teddy", *, overwrite: bool = False) -> OutputPlace:
        folder = self.folder / "out"
        return OutputPlace(
            name,
            folder / "perfusion_concepts",
            folder / "embeddings",
            folder / "runs" / name,
            overwrite=overwrite,
        )

    def train(
        self,
        family="sd15",
        dataset=None,
        *,
        name="teddy",
        covariance=None,
        progress=None,
        overwrite=False,
        stopping=None,
        ranks=None,
        **settings,
    ):
        """Train with the small settings above, changed by ``settings``."""
        return train.train(
            PerfusionConfig(**SETTINGS | settings),
            self.base(family),
            dataset or self.dataset(),
            covariance or self.covariance(family),
            self.place(name, overwrite=overwrite),
            device=CPU,
            progress=progress,
            stopping=stopping,
            ranks=ranks,
        )
