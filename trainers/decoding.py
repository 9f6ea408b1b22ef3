"""Picture files: from bytes to an upright picture of eight bits, whatever format and mode it was stored in."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..models.errors import DatasetError

MAX_PIXELS = 178_956_970
"""Larger pictures are refused; the number at which Pillow itself suspects a decompression bomb."""

# What Pillow's decoders raise on damaged files; anything else is a fault of ours and must surface as such.
_DAMAGED = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,  # a damaged header may ask for any amount; the picture's own size has been checked
    OSError,
    RuntimeError,  # AVIF
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_bytes(path: Path) -> bytes:
    """The file's content; DatasetError when it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: the file cannot be read ({error.strerror}); check its permissions") from error
    if not data:
        raise DatasetError(f"{path}: the file is empty (0 bytes); copy it again or remove it")
    return data


def decode(data: bytes, path: Path) -> Image.Image:
    """The first frame, upright, in whatever mode it was stored except that 16-bit and float become 8-bit."""
    too_large = f"{path}: found more than {MAX_PIXELS:,} pixels; scale the picture down first"
    try:
        with Image.open(BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DatasetError(too_large)
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            image = image.transpose(upright) if upright is not None else image.copy()
            return _to_eight_bits(image)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{path}: not a picture that can be read; save it as PNG or JPEG, or remove it") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(too_large) from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"{path}: the picture is damaged or cut short ({reason}); copy it again or remove it"
        ) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DAMAGED:  # cameras and editors write broken EXIF; the picture itself is still good
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion would clip at 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        peak = next((limit for limit in (1.0, 255.0, 65535.0) if values.max() <= limit), values.max())
    else:  # mode I is how 16-bit files used to arrive; only larger values tell a true 32-bit one
        peak = 65535.0 if values.max() <= 65535 else 2.0**31 - 1
    return Image.fromarray((values.clip(0, peak) * (255 / peak)).round().astype(np.uint8))


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture as RGB and its transparency, None when it is opaque everywhere."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("LA", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    return image.convert("RGB"), alpha if alpha.getextrema() != (255, 255) else None
