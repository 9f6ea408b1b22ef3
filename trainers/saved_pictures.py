"""PNG files that are either complete or absent, with the settings that made them inside."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..models.errors import ConfigError, FormatError


def save_png(path: Path, picture: Image.Image, texts: Mapping[str, str], *, overwrite: bool = False) -> Path:
    """Write a PNG with text entries; it appears under its name only when it has reached the disk.

    Raises:
        ConfigError: the file exists and may not be overwritten.
        FormatError: the disk refused; nothing is left behind.
    """
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:40]}.", delete=False) as file:
            temporary = Path(file.name)
            picture.save(file, "PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if overwrite:
            os.replace(temporary, path)
        else:
            refuse_existing([path])
            os.rename(temporary, path)
    except OSError as error:
        raise FormatError(
            f"{path.name} could not be saved in {path.parent} ({error.strerror}); "
            "free space or choose a writable folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def refuse_existing(paths: list[Path]) -> None:
    """Raise ConfigError when one of the files is there already."""
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path.name} exists already in {path.parent}; choose another name or turn on overwrite")
