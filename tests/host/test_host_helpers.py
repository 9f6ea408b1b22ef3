"""What the nodes ask of the host: folders, inference mode, progress and Cancel, picture layout."""

import os
import sys
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


def test_pictures_come_back_from_the_training_layout(comfy):
    from comfyui_personalize.nodes._host import images_to_pixels, pictures_to_images, pixels_to_images

    images = torch.rand(2, 5, 7, 3)
    pixels = images_to_pixels(images)
    assert pixels.shape == (2, 3, 5, 7)
    torch.testing.assert_close(pixels[1, 2, 3, 4], images[1, 3, 4, 2] * 2 - 1)
    torch.testing.assert_close(pixels_to_images(pixels), images)
    assert images_to_pixels(torch.rand(1, 4, 4, 4)).shape == (1, 3, 4, 4)
    assert images_to_pixels(torch.rand(1, 4, 4, 1)).shape == (1, 3, 4, 4)
    red = pictures_to_images([Image.new("RGB", (4, 2), (255, 0, 51))])
    torch.testing.assert_close(red, torch.tensor([1.0, 0.0, 0.2]).expand(1, 2, 4, 3))


def test_a_picture_survives_the_way_to_pil(comfy):
    from comfyui_personalize.nodes._host import image_to_picture, pictures_to_images

    picture = Image.effect_noise((6, 4), 60).convert("RGB")
    assert image_to_picture(pictures_to_images([picture])[0]).tobytes() == picture.tobytes()


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


def test_the_hosts_tokenizer_is_found(comfy):
    from comfyui_personalize.nodes._host import save_folder, tokenizer_folder

    assert {"vocab.json", "merges.txt"} <= {path.name for path in tokenizer_folder().iterdir()}
    assert save_folder("loras").is_relative_to(comfy.base)
