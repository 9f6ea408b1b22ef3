"""The trainer node in this process: what a server cannot show of memory, Cancel at awkward moments, linked values."""

import gc

import pytest
import torch
from safetensors.torch import load_file

HEAVY = {"UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection", "AutoencoderTiny", "AdamW"}


@pytest.fixture
def train(comfy, tiny_checkpoint, load_helper):
    """train(name, **settings): run Train DCO on one picture, as the host does it."""
    from comfyui_personalize.models.tokens import LearnedToken
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.train_dco import TrainDCO
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.dataset import Dataset

    quick = load_helper("host/training_graphs.py").QUICK
    base = open_base(tiny_checkpoint("sdxl"), tokenizer=_host.tokenizer_folder())
    tokens = (LearnedToken("<dog>", "dog"),)
    dataset = Dataset.from_tensors(_host.image_list([torch.rand(1, 40, 48, 3)]), "a <dog>", tokens=tokens)

    def run(name, **settings):
        node = TrainDCO.PREPARE_CLASS_CLONE(None)
        return node.execute(base=base, dataset=dataset, output_name=name, **quick | settings)

    return run


@pytest.fixture
def saved(comfy):
    """saved(name) -> the files of that name in the host's folders."""
    return lambda name: sorted(path for path in comfy.base.rglob(f"*{name}*") if path.is_file())


@pytest.fixture
def on_step(monkeypatch):
    """on_step(act): call act(number) before every training step."""
    from comfyui_personalize.trainers.dco import train

    def patch(act):
        done, step = [], train.dco_step

        def wrapped(*arguments, **keywords):
            done.append(None)
            act(len(done))
            return step(*arguments, **keywords)

        monkeypatch.setattr(train, "dco_step", wrapped)

    return patch


def alive():
    """Class names of the large things that training makes and that still exist."""
    gc.collect()
    return sorted(type(thing).__name__ for thing in gc.get_objects() if type(thing).__name__ in HEAVY)


def sample(comfy, load_helper):
    sampling = load_helper("host/sampling.py")
    model, clip, _ = comfy.load("sdxl")
    (positive,) = comfy.nodes.CLIPTextEncode().encode(clip, "a dog")
    return sampling.ksample(model, positive, positive, steps=2)


def out_of_memory(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_the_hosts_models_make_room_and_come_back_unchanged(comfy, train, on_step, load_helper):
    before = sample(comfy, load_helper)
    assert comfy.model_management.current_loaded_models
    loaded = []

    def count(_):  # without those whose patcher went away in another test's exception, which the host never unloads
        loaded.append(sum(not model.is_dead() for model in comfy.model_management.current_loaded_models))

    on_step(count)
    already = alive()
    output = train("room", steps=2)
    assert loaded == [0, 0]
    assert output.result[0] == "room.safetensors" and output.result[3] == 2
    assert alive() == already
    assert sample(comfy, load_helper).equal(before)


def test_out_of_memory_in_a_step(comfy, train, on_step, saved, load_helper):
    from comfyui_personalize.models.errors import TrainingError

    before, already = sample(comfy, load_helper), alive()
    on_step(lambda number: out_of_memory(number) if number == 3 else None)
    with pytest.raises(TrainingError) as error:
        train("too_much", steps=5)
    assert str(error.value) == (
        "out of memory at step 3 with batch size 1, fp32 and no gradient checkpointing; lower the batch size, the "
        "resolution or the rank, turn on gradient checkpointing, or train in bf16 "
        "(what was learned in 2 steps was saved)"
    )
    kept = {path.parent.name for path in saved("too_much.safetensors")}
    assert kept == {"loras", "embeddings"}
    assert (comfy.base / "output" / "personalize" / "too_much" / "state-00000002.safetensors").exists()
    del error
    assert alive() == already
    assert sample(comfy, load_helper).equal(before)


def test_out_of_memory_while_models_are_loaded(comfy, train, saved, monkeypatch):
    from comfyui_personalize.models.errors import TrainingError
    from comfyui_personalize.trainers.base import TrainingBase

    already = alive()
    monkeypatch.setattr(TrainingBase, "load_unet", lambda *arguments: out_of_memory(0))
    with pytest.raises(TrainingError, match="out of memory while loading the model and encoding .* lower the batch"):
        train("too_large")
    assert not saved("too_large")
    assert alive() == already


def test_cancel_while_the_result_is_saved(comfy, train, saved, monkeypatch):
    from comfyui_personalize.trainers import output

    write = output.write_safetensors

    def cancel_and_write(*arguments, **keywords):
        comfy.model_management.interrupt_current_processing()
        return write(*arguments, **keywords)

    already = alive()
    monkeypatch.setattr(output, "write_safetensors", cancel_and_write)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train("cancelled_saving")
    token, lora = [path for path in saved("cancelled_saving") if path.suffix == ".safetensors"]
    assert load_file(lora) and load_file(token)
    assert not saved(".partial")
    assert not comfy.model_management.processing_interrupted()
    assert alive() == already


def test_linked_values_lead_nowhere_else(comfy, load_helper):
    from comfyui_personalize.models.errors import DatasetError
    from comfyui_personalize.nodes.dataset import PersonalizationDataset
    from comfyui_personalize.nodes.training_picture import TrainingPicture

    load_helper("host/training_graphs.py").picture().save(comfy.base / "secret.png")
    for name in ("../secret.png", "../secret.png [temp]", str(comfy.base / "secret.png"), ""):
        with pytest.raises(DatasetError, match=r"is not in the \w+ folder; drop it on the node again"):
            TrainingPicture.execute(name, "a <dog>")
        assert TrainingPicture.fingerprint_inputs(name) == ""
    widgets = {"captions": ["a <dog>"], "base_captions": [""], "token": ["<dog>"], "initializer": ["dog"]}
    widgets |= {"rows_per_token": [1], "class_caption": [""]}
    for folder in ("..", "../..", str(comfy.base), "/", "absent"):
        with pytest.raises(DatasetError, match="is not a folder inside ComfyUI's input folder"):
            PersonalizationDataset.execute(folder=[folder], class_folder=["(none)"], **widgets)
        assert PersonalizationDataset.fingerprint_inputs([folder], [folder]) == "|"


def test_linked_folders_are_known_when_the_node_runs(comfy):
    from comfyui_personalize.nodes.dataset import PersonalizationDataset
    from comfyui_personalize.nodes.scores import PersonalizationScores
    from comfyui_personalize.nodes.subject_masks import SoftSubjectMasks

    link = (None,)  # what the host hands to the checks of a node that takes lists
    assert PersonalizationDataset.validate_inputs(link, link) is True
    assert PersonalizationScores.validate_inputs(link, link, link) is True
    assert SoftSubjectMasks.validate_inputs(link) is True
    assert PersonalizationDataset.fingerprint_inputs(link, link) == "|"
