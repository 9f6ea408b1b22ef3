"""Lists of the networks that lie in the host's model folders, each in a folder as transformers saves it."""

from collections.abc import Iterable
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..models.errors import FormatError
from ..trainers.network_folders import Kind, folder_files, network_in
from . import _host
from ._choices import known

NONE = "none"


def network_folders(place: str, kind: Kind) -> dict[str, Path]:
    """Folders in one of the host's model folders that hold a network of that kind, by the names in the list."""
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(place)):
        for pattern in ("*/config.json", "*/*/config.json"):
            for path in sorted(root.glob(pattern)):
                if network_in(path.parent) == kind:
                    found.setdefault(path.parent.relative_to(root).as_posix(), path.parent)
    return found


def folder_input(name: str, folders: Iterable[str], tooltip: str) -> io.Input:
    """A list of such folders, with none at its head and chosen at first."""
    return io.Combo.Input(name, options=[NONE, *folders], default=NONE, tooltip=tooltip)


def known_folder(kind: str, name: str | None, folders: Iterable[str]) -> bool | str:
    """For validate_inputs: True for one of the list, else the sentence to refuse it with."""
    return known(kind, name, [NONE, *folders])


def chosen_folder(folders: dict[str, Path], name: str) -> Path:
    """The folder of that name; FormatError when it has gone since it was listed."""
    if name not in folders:
        raise FormatError(f"there is no folder {name!r} with a fitting network any more; choose another one")
    return folders[name]


def folder_version(folder: Path | None) -> str:
    """A string that changes whenever one of the folder's files is written again."""
    return "" if folder is None else _host.file_version(*folder_files(folder))
