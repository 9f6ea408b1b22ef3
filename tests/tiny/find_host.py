"""Where ComfyUI is, decided in one place for the demo and for the tests."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def find_comfyui() -> Path | None:
    """Return the ComfyUI folder to use, or None.

    COMFYUI_PATH decides alone when it is set and not empty. Otherwise the first of these that holds main.py
    and comfy/: the one whose custom_nodes holds this project, ../ComfyUI, ~/ComfyUI, ~/comfy/ComfyUI, and the
    ComfyUI inside this project that `make demo` clones where there is no other.

    Raises:
        FileNotFoundError: COMFYUI_PATH is set but no ComfyUI is there.
    """
    if chosen := os.environ.get("COMFYUI_PATH"):
        path = Path(chosen).expanduser().resolve()
        if not _is_comfyui(path):
            raise FileNotFoundError(
                f"COMFYUI_PATH is {chosen!r}, but that folder does not hold ComfyUI's main.py and comfy/; "
                "set it to a ComfyUI checkout, or unset it"
            )
        return path
    home = Path.home()
    candidates = [PROJECT.parent / "ComfyUI", home / "ComfyUI", home / "comfy" / "ComfyUI", PROJECT / "ComfyUI"]
    if PROJECT.parent.name == "custom_nodes":
        candidates.insert(0, PROJECT.parent.parent)
    return next((path.resolve() for path in candidates if _is_comfyui(path)), None)


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()
