"""What the nodes ask of the host: folders, inference mode, progress and Cancel, picture layout."""

import os
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image


def test_autograd_works_again_inside_a_node(comfy):
    from comfyui_personalize.nodes._host import detach_from_inference, leave_inference_mode

    upstream = torch.ones(3)
    assert torch.is_inference_mode_enabled() and upstream.is_inference()
    with leave_inference_mode():
        weight = torch.ones(3, requires_grad=True)
        (detach_from_inference(upstream) * weight).sum().backward()
        assert weight.grad.tolist() == [1, 1, 1]
        ordinary = torch.ones(1)
        assert detach_from_inference(ordinary) is ordinary
    assert torch.is_inference_mode_enabled()


def test_pictures_are_shown_as_they_are(comfy):
    from comfyui_personalize.nodes._host import pictures_to_images

    red = pictures_to_images([Image.new("RGB", (4, 2), (255, 0, 51))])
    torch.testing.assert_close(red, torch.tensor([1.0, 0.0, 0.2]).expand(1, 2, 4, 3))


def test_a_failure_keeps_nothing_of_what_it_passed_through(comfy):
    from comfyui_personalize.models.errors import TrainingError
    from comfyui_personalize.nodes._host import leave_inference_mode, memory_given_back, short_paths

    kept = []

    def load():
        unet = torch.nn.Linear(2, 2)
        kept.append(weakref.ref(unet))
        try:
            unet(torch.zeros(3))
        except RuntimeError as error:
            raise TrainingError("out of memory") from error

    def train():
        model = torch.nn.Linear(2, 2)
        model.itself = [model]  # only the collector finds this one
        kept.append(weakref.ref(model))
        load()

    with pytest.raises(TrainingError, match="out of memory") as failure:
        with memory_given_back(), leave_inference_mode(), short_paths():
            train()
    assert isinstance(failure.value.__cause__.__cause__, RuntimeError)
    assert len(kept) == 2 and not any(reference() is not None for reference in kept)


def test_cancel_is_told_to_the_training_and_raised_only_when_it_has_saved(comfy, monkeypatch):
    from comfyui_personalize.nodes._host import HostProgress
    from comfyui_personalize.trainers.progress import Progress

    lines = []
    server = SimpleNamespace(send_progress_text=lambda text, node_id: lines.append((text, node_id)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    progress = HostProgress("7")
    assert isinstance(progress, Progress)
    progress.report(1, 10, "loss 0.5", Image.new("RGB", (8, 8)))
    assert lines == [("loss 0.5", "7")]
    assert not progress.cancelled()
    progress.raise_if_cancelled()
    comfy.model_management.interrupt_current_processing()
    progress.report(2, 10, "loss 0.4")  # does not raise
    assert progress.cancelled()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        progress.raise_if_cancelled()
    assert not comfy.model_management.processing_interrupted()


def test_cancel_that_the_hosts_progress_bar_consumed_is_not_lost(comfy, monkeypatch):
    from comfyui_personalize.nodes._host import HostProgress

    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, node_id))
        if len(seen) == 2:
            raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", hook)
    progress = HostProgress("7", total=10)
    for step in (1, 10):
        progress.report(step, 10)
    assert seen == [(1, 10, "7"), (10, 10, "7")]
    assert progress.cancelled()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        progress.raise_if_cancelled()


def test_a_file_written_again_has_another_version(comfy, tmp_path):
    from comfyui_personalize.nodes._host import file_version

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"1")
    first = file_version(path, None, tmp_path / "absent")
    os.utime(path, ns=(1, 1))
    assert file_version(path) != first
    assert file_version(tmp_path / "absent") == ""


def test_a_listed_file_written_again_has_another_version(comfy):
    from comfyui_personalize.nodes._host import file_version, model_version, save_folder

    path = save_folder("loras") / "version.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1")
    first = model_version("loras", None, path.name, "(none)", "")
    assert first == file_version(path) != ""
    os.utime(path, ns=(1, 1))
    assert model_version("loras", path.name) != first
    path.unlink()
    assert model_version("loras", path.name) == ""


@pytest.fixture
def picture_folders(comfy, tmp_path, monkeypatch):
    """picture_folders(*files) -> folders that the dataset node offers when the input folder holds these files."""
    from comfyui_personalize.nodes import dataset

    monkeypatch.setattr(comfy.folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))

    def offered(*files):
        for name in files:
            path = tmp_path / "input" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        schema = dataset.PersonalizationDataset.define_schema()
        (options,) = {tuple(entry.options) for entry in schema.inputs if entry.id in ("folder", "class_folder")}
        return list(options)

    return offered


def test_folders_with_pictures_are_offered(picture_folders, tmp_path):
    assert picture_folders() == ["(none)"]
    (tmp_path / "input" / "not.a.picture" / "folder.png").mkdir(parents=True)
    found = picture_folders(
        "top.png", "b/1.PNG", "b/2.jpg", "a/deep/er/1.webp", "a/deep/er/still/1.png", "b/mask/1.png", "c/notes.txt"
    )
    assert found == ["(none)", "a/deep/er", "b"]
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "input" / "b")
    assert picture_folders() == ["(none)", "a/deep/er", "b", "linked"]


def test_folders_are_searched_once_a_schema_and_no_picture_but_the_first_is_looked_at(picture_folders, monkeypatch):
    listed, asked = [], []
    scan = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.path, self.is_dir, self._entry = entry.name, entry.path, entry.is_dir, entry

        def is_file(self):
            asked.append(self.name)
            return self._entry.is_file()

    class Scan:
        def __init__(self, path):
            listed.append(os.path.basename(path))
            self._entries = scan(path)

        def __enter__(self):
            return map(Entry, self._entries)

        def __exit__(self, *_):
            self._entries.close()

    picture_folders(*(f"many/{index}.png" for index in range(50)))
    monkeypatch.setattr(os, "scandir", Scan)
    assert picture_folders() == ["(none)", "many"]
    assert listed == ["input", "many"] and len(asked) == 1


def test_the_hosts_tokenizer_is_found(comfy):
    from comfyui_personalize.nodes._host import save_folder, tokenizer_folder

    assert {"vocab.json", "merges.txt"} <= {path.name for path in tokenizer_folder().iterdir()}
    assert save_folder("loras").is_relative_to(comfy.base)
