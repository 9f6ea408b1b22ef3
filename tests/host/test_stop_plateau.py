"""Stop: CLIP Plateau, the presets of Stop: Fixed and Choose Initializer in this process."""

import json
import shutil

import pytest
import torch

QUICK = {"preset": "custom", "patience": 0, "eps": 1.0, "every": 2, "pictures": 2, "sampling_steps": 1}
CLIP = "tiny_clip"


@pytest.fixture(scope="module")
def clip_folder(host_modules, tiny_clip):
    """The host's folder for scoring with a tiny CLIP."""
    folder = host_modules.base / "models" / "scoring" / CLIP
    shutil.copytree(tiny_clip, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def rule(comfy, clip_folder):
    """rule(**widgets): what Stop: CLIP Plateau gives; its own defaults where nothing is said."""
    from comfyui_personalize.nodes.plateau import StopCLIPPlateau

    defaults = {socket.id: socket.default for socket in StopCLIPPlateau.define_schema().inputs}
    return lambda **widgets: StopCLIPPlateau.execute(**defaults | {"clip_folder": CLIP} | widgets).result[0]


@pytest.fixture
def dataset(comfy):
    from comfyui_personalize.models.tokens import LearnedToken
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.trainers.dataset import Dataset

    picture = torch.rand(1, 40, 48, 3, generator=torch.Generator().manual_seed(1))
    return Dataset.from_tensors(_host.image_list([picture]), "a <dog>", tokens=(LearnedToken("<dog>", "dog"),))


def test_it_stops_a_training_and_shows_why(comfy, rule, dataset, tiny_checkpoint, load_helper):
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.train_dco import TrainDCO
    from comfyui_personalize.trainers.base import open_base

    quick = load_helper("host/training_graphs.py").QUICK | {"steps": 40}
    base = open_base(tiny_checkpoint("sd15"), tokenizer=_host.tokenizer_folder())
    node = TrainDCO.PREPARE_CLASS_CLONE(None)
    output = node.execute(base=base, dataset=dataset, output_name="plateau", stopping=rule(**QUICK), **quick)
    _, curve, _, steps, summary = output.result
    assert steps == 4 and "checks in a row, 2 steps apart: 1" in summary
    log = comfy.base / "output" / "personalize" / "plateau" / "log.jsonl"
    assert [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "clip" in line] == [3, 4]
    assert curve.shape == (1, 720, 768, 3)  # with the similarities below the loss


def test_presets_and_own_numbers(rule):
    found = {name: rule(preset=name, patience=7, eps=0.9, sampling_steps=5) for name in ("textual inversion", "custom")}
    assert {name: (one.patience, one.eps, one.pictures.steps) for name, one in found.items()} == {
        "textual inversion": (6, 0.02, 50),
        "custom": (7, 0.9, 5),
    }
    default = rule(prompts="a <dog> \n\n the <dog>")
    assert (default.patience, default.eps, default.every, default.limit(9)) == (3, 0.04, 50, 9)
    assert (default.pictures.steps, default.pictures.guidance, default.pictures.count) == (200, 6.0, 8)
    assert default.pictures.prompts == ("a <dog>", "the <dog>") and default.pictures.clip.name == CLIP


def test_what_cannot_work_is_refused(comfy, rule, clip_folder):
    from comfyui_personalize.models.errors import ConfigError, FormatError
    from comfyui_personalize.nodes.plateau import StopCLIPPlateau

    with pytest.raises(ConfigError, match="no CLIP to compare pictures with; put the files of .* into models/scoring/"):
        rule(clip_folder="none")
    with pytest.raises(ConfigError, match="eps must be above 0 and at most 1"):
        rule(preset="custom", eps=0.0)
    with pytest.raises(FormatError, match="there is no folder 'gone'"):
        rule(clip_folder="gone")
    assert StopCLIPPlateau.validate_inputs(preset="dreambooth", clip_folder=CLIP) is True
    assert "no preset named 'sloth'" in StopCLIPPlateau.validate_inputs(preset="sloth")
    assert "no CLIP named 'gone'" in StopCLIPPlateau.validate_inputs(clip_folder="gone")
    before = StopCLIPPlateau.fingerprint_inputs(clip_folder=CLIP)
    (clip_folder / "preprocessor_config.json").write_text("{}")
    assert StopCLIPPlateau.fingerprint_inputs(clip_folder=CLIP) != before != ""


def test_a_single_file_of_the_host_will_do(comfy, rule, dataset, tiny_clip):
    from safetensors.torch import load_file, save_file

    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.trainers.likeness import Likeness

    folder = comfy.base / "models" / "clip_vision"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value for name, value in load_file(tiny_clip / "model.safetensors").items() if "text" not in name}
    save_file(weights, folder / "tiny.safetensors")
    found = rule(clip_folder="clip_vision/tiny.safetensors").pictures.clip
    assert found.name == "tiny.safetensors"
    with pytest.raises(IncompatibleModelError, match="32 wide"):  # known widths are those of real models
        Likeness(found, dataset, torch.device("cpu"))


def test_stop_fixed_has_the_authors_budgets(comfy):
    from comfyui_personalize.nodes.stopping import BUDGETS, StopFixed

    assert list(BUDGETS.values()) == [475, 367, 450, 6100, 500, 1000]
    assert StopFixed.execute(12).result[0].steps == 12
    assert StopFixed.execute(12, "custom diffusion, short").result[0].steps == 367
    assert StopFixed.validate_inputs(preset="dreambooth, full") is True
    assert "no preset named 'sloth'" in StopFixed.validate_inputs(preset="sloth")


def test_words_are_chosen_by_clip_or_at_random(comfy, clip_folder, dataset):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.initializers import ChooseInitializer

    node = ChooseInitializer.PREPARE_CLASS_CLONE(None)
    words = "boat\nlamp\ncat"
    chosen, best, ranking = node.execute(dataset, "best", CLIP, words).result
    assert chosen.tokens[0].initializer == best and chosen.examples[0].base_caption == f"a {best}"
    assert (
        ranking.startswith(f"`<dog>` starts from {best}\n") and ranking.count("\n| ") == 5 and f"| {best} |" in ranking
    )
    worst = node.execute(dataset, "worst", CLIP, words).result[1]
    assert {best, worst} < {"boat", "lamp", "cat"} and best != worst
    drawn = node.execute(dataset, "random", "none", words, 3).result
    assert drawn[1] in words and drawn[2] == f"`<dog>` starts from {drawn[1]}"
    with pytest.raises(ConfigError, match="strategy best needs a CLIP; put the files of .* or choose random"):
        node.execute(dataset, "best", "none", words)
    assert "no strategy named 'luck'" in ChooseInitializer.validate_inputs(strategy="luck")
    assert ChooseInitializer.validate_inputs(strategy="best", clip_folder=CLIP) is True


def test_a_cancel_ends_the_reading_of_words(comfy, clip_folder, dataset):
    from comfyui_personalize.nodes.initializers import ChooseInitializer

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ChooseInitializer.PREPARE_CLASS_CLONE(None).execute(dataset, "best", CLIP, "boat")
    comfy.model_management.interrupt_current_processing(False)
