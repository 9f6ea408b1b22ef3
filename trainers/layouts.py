"""Where a dataset's parts lie on disk: caption files, mask folders, and the DCO authors' JSON file."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import DatasetError

CONFIG_NAME = "config.json"
MASK_FOLDER = "mask"

# Formats that Pillow cannot open everywhere (HEIC) are listed too: better named in a message than silently left out.
PICTURE_ENDINGS = frozenset(
    ".avif .bmp .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .jxl .pbm .pgm .png .ppm .tga .tif .tiff .webp".split()
)


@dataclass(frozen=True)
class JsonSection:
    """One section of the JSON file, with its paths found."""

    images: list[Path]
    prompts: list[str]
    base_prompts: list[str] | None
    tokens: list[tuple[str, str]]
    """(trigger, initializer) pairs."""
    masks: list[Path] | None
    class_folder: Path | None
    class_prompts: list[str] | None


def folder(path: str | Path) -> Path:
    """``path`` as a Path, or DatasetError when it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise DatasetError(f"{path}: found {found}, expected a folder of pictures; correct the path")
    return path


def natural_key(path: Path) -> tuple[list[str | int], str]:
    """Sort key that puts 2.jpg before 10.jpg and ignores case."""
    pieces = re.split(r"([0-9]+)", path.name.lower())
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], path.name


def picture_files(directory: Path) -> list[Path]:
    """The folder's pictures in natural order; hidden files and other endings are passed over."""
    files = [file for file in directory.iterdir() if _is_picture(file)]
    if not files:
        raise DatasetError(f"{directory}: found no pictures; put PNG, JPEG or WebP files there")
    return sorted(files, key=natural_key)


def sidecar_captions(files: Sequence[Path]) -> list[str]:
    """The text of ``name.txt`` beside each picture, which every picture must have."""
    for file in files:
        if not file.with_suffix(".txt").is_file():
            raise DatasetError(
                f"{file}: found no caption; write it into {file.stem}.txt beside the picture, or give the captions"
            )
    return [_read_text(file.with_suffix(".txt")) for file in files]


def sidecar_base_captions(files: Sequence[Path]) -> list[str | None]:
    """The text of ``name.base.txt`` beside each picture, None where there is no such file."""
    sidecars = [file.with_name(f"{file.stem}.base.txt") for file in files]
    return [_read_text(sidecar) if sidecar.is_file() else None for sidecar in sidecars]


def mask_files(pictures: Sequence[Path], beside: Path, directory: str | Path | None = None) -> list[Path | None]:
    """The mask of each picture, the file of the same name in ``directory`` or in ``mask/``; None where there is none.

    Raises:
        DatasetError: a mask has the name of no picture (a slip that would silently train the whole
            picture), or two masks have the same name.
    """
    if directory is None:
        masks = beside / MASK_FOLDER
        if not masks.is_dir():
            return [None] * len(pictures)
    else:
        masks = folder(directory)
    stems = {picture.stem for picture in pictures}
    found: dict[str, Path] = {}
    for mask in sorted((file for file in masks.iterdir() if _is_picture(file)), key=natural_key):
        if mask.stem not in stems:
            raise DatasetError(f"{mask}: found no picture of this name; name each mask like its picture, or remove it")
        if mask.stem in found:
            raise DatasetError(f"{mask}: {found[mask.stem].name} is a mask for the same picture; keep one of them")
        found[mask.stem] = mask
    return [found.get(picture.stem) for picture in pictures]


def has_sections(path: Path) -> bool:
    """Whether the file exists and lists images as the DCO authors' does; other tools' config.json do not."""
    if not path.is_file():
        return False
    content = _load(path)
    return "images" in content or any(isinstance(value, dict) and "images" in value for value in content.values())


def read_json(path: str | Path, name: str | None = None, *, within: Path | None = None) -> JsonSection:
    """Read one section of a JSON file in the DCO authors' layout and find its files.

    Args:
        within: folder that no listed path may lead out of; for JSON files that others have sent.

    Raises:
        DatasetError: the file is missing or not JSON, the section is missing or ambiguous, an entry is
            missing or of the wrong type, or a listed picture is not found.
    """
    path = Path(path)
    section = _pick_section(path, _load(path), name)
    images = [_find(path, image, within) for image in _strings(path, section, "images", required=True)]
    masks = _strings(path, section, "masks")
    triggers = _strings(path, section, "inserting_tokens") or []
    initializers = _strings(path, section, "initializer_tokens")
    if initializers is None:
        initializers = [""] * len(triggers)
    if len(initializers) != len(triggers):
        raise DatasetError(
            f"{path}: found {len(triggers)} inserting_tokens and {len(initializers)} initializer_tokens; "
            "give one initializer each, '' for none"
        )
    class_folder = section.get("class_images_dir")
    if class_folder is not None and not isinstance(class_folder, str):
        raise DatasetError(f"{path}: 'class_images_dir' is {class_folder!r}; write the path of a folder")
    return JsonSection(
        images=images,
        prompts=_strings(path, section, "prompts", required=True),
        base_prompts=_strings(path, section, "base_prompts"),
        tokens=list(zip(triggers, initializers)),
        masks=None if masks is None else [_find(path, mask, within) for mask in masks],
        class_folder=None if class_folder is None else _find(path, class_folder, within),
        class_prompts=_strings(path, section, "class_prompts"),
    )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_ENDINGS and not file.name.startswith(".") and file.is_file()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: the file is not UTF-8 text; save it again as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{path}: the file cannot be read ({error.strerror}); check it") from error


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; correct the path or give the captions another way")
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error}); correct it") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected an object with 'images' and 'prompts', found {type(content).__name__}")
    return content


def _pick_section(path: Path, content: dict[str, Any], name: str | None) -> dict[str, Any]:
    if name is None and "images" in content:
        return content
    sections = {key: value for key, value in content.items() if isinstance(value, dict) and "images" in value}
    known = ", ".join(sections) or "none"
    if name is not None:
        if name not in sections:
            raise DatasetError(f"{path}: found no section {name!r} with images; choose one of: {known}")
        return sections[name]
    if len(sections) > 1:
        full = {key: value for key, value in sections.items() if {"base_prompts", "inserting_tokens"} & value.keys()}
        sections = full or sections
    if len(sections) != 1:
        raise DatasetError(
            f"{path}: expected one section with images, found: {known}; name the one to use"
            if known != "none"
            else f"{path}: found no section with 'images' and 'prompts'; give the captions another way"
        )
    return next(iter(sections.values()))


def _strings(path: Path, section: dict[str, Any], key: str, *, required: bool = False) -> list[str] | None:
    values = section.get(key)
    if values is None:
        if required:
            raise DatasetError(f"{path}: {key!r} is missing; add the list")
        return None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DatasetError(f"{path}: {key!r} is {type(values).__name__}; write a list of texts")
    return values


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path stays in a folder as it is written; links that the folder's owner put there may lead on."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _find(config: Path, listed: str, within: Path | None) -> Path:
    """``listed`` relative to the JSON file's folder, else its bare name there."""
    name = listed.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    for candidate in (config.parent / listed, config.parent / name):
        if name and (within is None or is_inside(candidate, within)) and candidate.exists():
            return candidate
    raise DatasetError(f"{config}: found neither {listed!r} nor {name!r} beside it; correct the path")
