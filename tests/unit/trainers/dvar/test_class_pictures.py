"""Class pictures that the base model draws: once, resumed, shared, and the dataset's own by number."""

import pytest
import torch
from PIL import Image

from comfyui_personalize.models.errors import ConfigError, DatasetError
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.class_pictures import ClassPictures
from comfyui_personalize.trainers.dvar import custom_diffusion, dreambooth
from comfyui_personalize.trainers.dvar.config import CustomDiffusionConfig, DreamBoothConfig
from comfyui_personalize.trainers.dvar.prior import with_class_pictures
from comfyui_personalize.trainers.prepared import Surroundings
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.ranks import Ranks

DOG = LearnedToken("<dog>", "dog")
DRAWN = {"class_pictures": 3, "class_prompt": "a photo of a dog", "class_steps": 2, "steps": 2}


@pytest.fixture
def run(tiny):
    return lambda *arguments, **more: tiny.train(dreambooth, DreamBoothConfig, *arguments, **DRAWN | more)


class Watcher(SilentProgress):
    """Keeps what is said, and cancels when it hears ``at``."""

    def __init__(self, at=None):
        self.at, self.said, self.flag = at, [], False

    def report(self, step, total, message="", preview=None):
        self.said.append(message)
        self.flag = self.flag or message == self.at

    def cancelled(self):
        return self.flag


def drawn(tiny):
    return sorted((tiny.folder / "out" / "runs" / "class_pictures").rglob("*.png"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_base_model_draws_what_the_dataset_lacks(family, run, tiny, monkeypatch):
    loads, load = [], TrainingBase.load_unet
    monkeypatch.setattr(TrainingBase, "load_unet", lambda *a: loads.append(a) or load(*a))
    watcher = Watcher()
    first = run(family, name="first", progress=watcher)
    assert "drawing pictures of the class: 3 of 3" in watcher.said and len(loads) == 2
    pictures = [Image.open(path) for path in drawn(tiny)]
    assert [picture.size for picture in pictures] == [(64, 64)] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert pictures[0].text["prompt"] == "a photo of a dog"
    again = run(family, name="again")
    assert len(loads) == 3 and again.train.losses == first.train.losses
    other = run(family, name="other", class_pictures=0, class_prompt="")
    assert other.train.losses != first.train.losses


def test_a_cancelled_drawing_goes_on_where_it_was(run, tiny):
    whole = run(name="whole", batch_size=1)
    pictures = {path.name: path.read_bytes() for path in drawn(tiny)}
    drawn(tiny)[1].unlink()
    drawn(tiny)[1].unlink()
    result = run(name="parts", batch_size=1, progress=Watcher("drawing pictures of the class: 1 of 2"))
    assert (result.train.stopped_by, result.files, len(drawn(tiny))) == ("cancelled", (), 2)
    rest = run(name="parts", batch_size=1)
    assert {path.name: path.read_bytes() for path in drawn(tiny)} == pictures
    assert rest.train.losses == whole.train.losses


class Second(Ranks):
    """The second of two processes, as far as it can tell alone."""

    index, count = 1, 2


def test_processes_draw_different_ones(tiny):
    pictures = ClassPictures(tiny.base(), tiny.folder, 5, "a dog", steps=1, side=64, seed=0, precision="fp32")
    pictures.draw(torch.device("cpu"), SilentProgress(), Second())
    assert [path.exists() for path in pictures.paths] == [False, True, False, True, False]
    pictures.draw(torch.device("cpu"), SilentProgress(), Ranks(), at_once=2)
    assert all(path.exists() for path in pictures.paths)


def test_resume_takes_the_same_pictures(tiny):
    settings = {**DRAWN, "rescale_variants": 0, "steps": 3}
    whole = tiny.train(custom_diffusion, CustomDiffusionConfig, name="whole", **settings)
    tiny.train(custom_diffusion, CustomDiffusionConfig, name="parts", checkpoint_every=1, **settings | {"steps": 1})
    rest = tiny.train(custom_diffusion, CustomDiffusionConfig, name="parts", resume=True, **settings)
    assert rest.train.losses == whole.train.losses


def test_pictures_of_the_dataset_are_counted(run, tiny):
    dataset = tiny.dataset(DOG, class_caption="a dog")
    with pytest.raises(DatasetError, match="has 3 class pictures and class_pictures asks for 4; add more"):
        run(dataset=dataset, class_pictures=4)
    assert run(dataset=dataset, class_pictures=2).train.steps == 2 and not drawn(tiny)


def test_a_prompt_that_nothing_is_drawn_of_is_warned_of(tiny, recwarn):
    def told(dataset=None, ranks=None, **settings):
        """What is said of pictures that are not to be drawn."""
        config, around = DreamBoothConfig(class_pictures=0, **settings), Surroundings(torch.device("cpu"), ranks=ranks)
        dataset = dataset or tiny.dataset(DOG)
        assert with_class_pictures(config, None, dataset, None, around) == (dataset, around)
        return [str(recwarn.pop().message) for _ in range(len(recwarn))]

    (said,) = told(class_prompt="a photo of a dog")
    assert said.startswith("class_prompt has no effect while class_pictures is 0") and "set class_pictures" in said
    assert not told(class_prompt=" ")
    assert not told(class_prompt="a dog", dataset=tiny.dataset(DOG, class_caption="a dog"))
    assert not told(class_prompt="a dog", ranks=Second())


def test_nothing_is_drawn_for_a_run_that_is_refused(run, tiny):
    with pytest.raises(ConfigError, match="write class_prompt, such as a photo of a dog"):
        run(class_prompt=" ")
    with pytest.raises(DatasetError, match="class caption 'a <dog>' contains"):
        run(class_prompt="a <dog>")
    (tiny.folder / "out" / "main").mkdir(parents=True)
    (tiny.folder / "out" / "main" / "my_dog.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="exists already"):
        run()
    assert not drawn(tiny)
