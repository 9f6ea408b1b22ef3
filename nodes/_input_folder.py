"""What users have put into the host's input folder: folders of pictures and of people, and text files.

The host asks for every node's schema whenever a page opens or a prompt is queued, so listing must be quick.
"""

import hashlib
import os
from pathlib import Path

import folder_paths

from ..models.errors import DatasetError
from ..trainers.layouts import is_inside
from . import _host

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_DEPTH = 3


def text_files() -> list[str]:
    """Text files in the input folder itself, by name."""
    return sorted(entry.name for entry in _entries() if entry.name.lower().endswith(".txt") and entry.is_file())


def text_path(name: str) -> Path:
    """The text file of that name among those; DatasetError when it is none of them."""
    if name not in text_files():
        raise DatasetError(f"{name!r} is not a text file in ComfyUI's input folder; choose one from the list")
    return Path(folder_paths.get_input_directory()) / name


def folders() -> list[str]:
    """Folders directly below the input folder, by name."""
    return sorted(entry.name for entry in _entries() if entry.is_dir())


def picture_folders() -> list[str]:
    """Folders at most three levels below the input folder that hold pictures, by relative name; none of masks."""
    found = []

    def visit(path: str, name: str, depth: int) -> None:
        below, pictures = [], False
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    # The ending first: a file whose name tells what it is need not be asked for its kind.
                    if entry.name.lower().endswith(_PICTURES):
                        pictures = pictures or entry.is_file()
                    elif depth < _DEPTH and entry.is_dir():
                        below.append(entry)
        except OSError:  # not readable for us, or gone since
            return
        if name and pictures and os.path.basename(name) not in ("mask", "masks"):
            found.append(name)
        for entry in below:
            visit(entry.path, f"{name}/{entry.name}" if name else entry.name, depth + 1)

    visit(folder_paths.get_input_directory(), "", 0)
    return sorted(found)


def folder_path(name: str) -> Path:
    """The folder of that name inside the input folder; DatasetError for anything outside it."""
    root = Path(folder_paths.get_input_directory())
    path = Path(os.path.abspath(root / name))
    if not is_inside(path, root) or not path.is_dir():
        raise DatasetError(f"{name!r} is not a folder inside ComfyUI's input folder; choose one from the list")
    return path


def folder_version(name: str | None) -> str:
    """A string that changes with any file of a folder, for ``fingerprint_inputs``; empty for none."""
    try:
        files = sorted(path for path in folder_path(name).rglob("*") if path.is_file()) if name else []
    except DatasetError:
        return ""
    return hashlib.sha256(_host.file_version(*files).encode()).hexdigest() if files else ""


def _entries() -> list[os.DirEntry]:
    root = folder_paths.get_input_directory()
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return list(entries)
