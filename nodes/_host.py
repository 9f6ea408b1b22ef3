"""All that we ask of ComfyUI besides node schemas: folders, memory, inference mode, progress, picture layout."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor, nn

from ..models.errors import FormatError, PersonalizeError
from . import _folders

PREVIEW_SIDE = 512
"""Longest side in pixels of the pictures shown while a node works."""


def model_files(kind: str) -> list[str]:
    """Names of the files in one of the host's model folders, such as ``loras`` or ``embeddings``."""
    return folder_paths.get_filename_list(kind)


def model_path(kind: str, name: str) -> Path:
    """Path of a file that model_files listed; FormatError when it has gone since."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise FormatError(f"{name} is not in the {kind} folder any more; press R to refresh the list and choose again")
    return Path(path)


def find_model_file(kind: str, name: str) -> Path | None:
    """Path of a file in one of the host's model folders, or None."""
    path = folder_paths.get_full_path(kind, name)
    return None if path is None else Path(path)


def save_folder(kind: str) -> Path:
    """The folder in which new files of a kind are kept; the first one that the host searches."""
    return Path(folder_paths.get_folder_paths(kind)[0])


def file_version(*paths: Path | None) -> str:
    """A string that changes whenever one of the files is written again, for ``fingerprint_inputs``."""
    parts = []
    for path in paths:
        if path is not None and path.is_file():
            status = path.stat()
            parts.append(f"{path}:{status.st_mtime_ns}:{status.st_size}")
    return "|".join(parts)


def model_version(kind: str, *names: str | None) -> str:
    """The same for files in one of the host's model folders; what is linked, or is no file's name, does not count."""
    return file_version(*(find_model_file(kind, name) for name in names if name))


def _hidden_roots() -> list[str]:
    """What messages need not say of a path: the host's own folders, and those above its folders of models.

    The latter may lie anywhere, as extra_model_paths.yaml says.
    """
    roots = {folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.models_dir}
    for kind in ("checkpoints", "vae", "loras", "embeddings", *_folders.ENDINGS):
        parents = (Path(folder).parent for folder in folder_paths.get_folder_paths(kind))
        roots |= {str(parent) for parent in parents if parent != parent.parent}
    return sorted(roots, key=len, reverse=True)


@contextmanager
def short_paths() -> Iterator[None]:
    """Name files in our error messages relative to the host's folders: whoever posts workflows sees the messages."""
    try:
        yield
    except PersonalizeError as error:
        message = str(error)
        for folder in _hidden_roots():
            message = message.replace(f"{folder}{os.sep}", "")
        raise type(error)(message) from error


def tokenizer_folder() -> Path:
    """Folder with the CLIP tokenizer that ships with the host."""
    import comfy.sd1_clip

    return Path(comfy.sd1_clip.__file__).resolve().parent / "sd1_tokenizer"


def free_vram() -> None:
    """Unload every model of the host, so that a training of ours has the device for itself."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def device_with_room(network: nn.Module) -> torch.device:
    """The host's device, on which the host's models have made room for a network of ours."""
    memory = comfy.model_management
    device = memory.get_torch_device()
    memory.free_memory(memory.module_size(network) + memory.minimum_inference_memory(), device)
    return device


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Leave nothing of the body's behind on the device, also when it fails.

    An exception keeps the local variables of all functions it passed through, so the models that a failed
    training loaded, until the host has forgotten it.
    """
    try:
        yield
    except BaseException as error:
        passed: list[BaseException | None] = [error]
        for failure in passed:
            if failure is not None:
                traceback.clear_frames(failure.__traceback__)
                passed += [e for e in (failure.__cause__, failure.__context__) if e not in passed]
        raise
    finally:
        gc.collect()
        comfy.model_management.soft_empty_cache()


@contextmanager
def leave_inference_mode() -> Iterator[None]:
    """Let autograd work inside a node; the host runs nodes in ``torch.inference_mode()``.

    Tensors made upstream stay inference tensors: pass them through ``detach_from_inference`` as well.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def detach_from_inference(tensor: Tensor) -> Tensor:
    """The tensor itself, or an ordinary copy when it was made in inference mode; call it outside that mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def interrupted() -> bool:
    """Whether the user pressed Cancel; the request stays pending."""
    return comfy.model_management.processing_interrupted()


def raise_if_interrupted() -> None:
    """Hand a pending Cancel over to the host, which ends the prompt; our part must be saved by then."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class HostProgress:
    """trainers.progress.Progress on the node in the page: bar, preview picture and a line of text."""

    def __init__(self, node_id: str | None, total: int = 1):
        self._node_id = node_id
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._total = total
        self._cancelled = False

    def report(self, step: int, total: int, message: str = "", preview: Image.Image | None = None) -> None:
        """Show how far the work is; never raises for a Cancel, which ``cancelled`` tells instead."""
        if self.cancelled():
            return
        try:
            if total != self._total:
                # The host leaves out updates below the last one shown: each part of the work needs a bar of its own.
                self._bar = comfy.utils.ProgressBar(total, node_id=self._node_id)
                self._total = total
            frame = None if preview is None else ("JPEG", preview, PREVIEW_SIDE)
            self._bar.update_absolute(step, total, frame)
        except comfy.model_management.InterruptProcessingException:
            # The bar's hook consumed the request; what was trained so far must be saved before it takes effect.
            self._cancelled = True
            return
        self._say(message)

    def cancelled(self) -> bool:
        """Whether the user pressed Cancel since the work began."""
        return self._cancelled or interrupted()

    def raise_if_cancelled(self) -> None:
        """End the prompt when Cancel was pressed; call after everything has been saved."""
        raise_if_interrupted()
        if self._cancelled:
            raise comfy.model_management.InterruptProcessingException()

    def _say(self, line: str) -> None:
        # Not imported: where the host runs without its server, nobody could read the line.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if line and server is not None and self._node_id is not None:
            server.send_progress_text(line, self._node_id)


def pictures_to_images(pictures: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> host pictures (batch, height, width, 3) in 0..1."""
    stacked = [torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8) for p in pictures]
    return torch.stack([s.view(p.height, p.width, 3) for s, p in zip(stacked, pictures)]).float() / 255


def image_list(images: list[Tensor]) -> list[Tensor]:
    """Batches of host pictures of any sizes -> single pictures (height, width, channels), free of inference mode."""
    with torch.inference_mode(False):
        return [detach_from_inference(image).cpu() for batch in images for image in batch.unbind(0)]


def mask_list(masks: list[Tensor]) -> list[Tensor | None]:
    """Batches of host masks -> single masks (height, width) in 0..1, None for masks that are white everywhere.

    The host makes masks of 64 x 64 pixels for pictures without transparency, whatever the picture's shape.
    """
    with torch.inference_mode(False):
        batches = [mask if mask.ndim == 3 else mask.unsqueeze(0) for mask in masks]
        single = [detach_from_inference(mask).cpu() for batch in batches for mask in batch.unbind(0)]
    return [None if mask.numel() and mask.min() == 1 else mask for mask in single]
