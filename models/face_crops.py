"""One face of a picture chosen, and cut out upright or as it stands."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, FormatError
from .faces import Face
from .lookahead.alignment import REFERENCE_POINTS, crop, fit_similarity, invert, widened

Choice = Literal["largest", "left-most", "by index"]
Framing = Literal["aligned", "square"]


def choose_face(faces: Sequence[Face], choice: Choice = "largest", index: int = 0) -> Face | None:
    """One of the faces in a picture, or None when there is none like that.

    Args:
        choice: "largest" goes by the area of the box, "by index" counts from the left.
        index: for "by index"; 0 is the left-most.
    """
    if choice == "largest":
        return max(faces, key=_area, default=None)
    if choice not in ("left-most", "by index"):
        raise ConfigError(f"a face is chosen as largest, left-most or by index, not as {choice!r}")
    place = index if choice == "by index" else 0
    from_left = sorted(faces, key=lambda face: face.box[0] + face.box[2])
    return from_left[place] if 0 <= place < len(faces) else None


def cut_face(image: Tensor, face: Face, size: int, *, framing: Framing = "aligned", margin: float = 1.3) -> Tensor:
    """Cut a face out of a picture at a size of its own.

    Args:
        image: (channels, height, width) in -1..1.
        size: side of the result in pixels.
        framing: "aligned" turns and scales the face so that eyes, nose and mouth come to lie on the reference points,
            as in the LCM-Lookahead authors' data/dataset.py; what lies outside the picture becomes mid-grey, as there.
            Their fit of the landmarks is taken without the mirroring that it now and then chooses.
            "square" cuts a square around the box without turning, and never reaches outside the picture.
        margin: how many times as much to show as the face takes up. The encoder was trained with aligned faces at 1.3.

    Returns:
        (channels, size, size), in -1..1.

    Raises:
        FormatError: the face is to be aligned and its detector gives no landmarks.
    """
    if framing == "square":
        return _square_around(image, face.box, size, margin)
    if framing != "aligned":
        raise ConfigError(f"a face is cut out aligned or square, not {framing!r}")
    if face.landmarks is None:
        raise FormatError("the face detector gives no landmarks to align by; cut squares, or use det_10g.onnx")
    transform = fit_similarity(face.landmarks[None], widened(REFERENCE_POINTS, margin) * size, "inverse")
    return crop(*_shrunk(image[None], transform), size)[0]


def _area(face: Face) -> float:
    left, top, right, bottom = face.box
    return (right - left) * (bottom - top)


def _square_around(image: Tensor, box: tuple[float, float, float, float], size: int, margin: float) -> Tensor:
    """A square around the box, moved and if need be made smaller until it lies in the picture."""
    height, width = image.shape[-2:]
    left, top, right, bottom = box
    side = max(1, min(round(margin * max(right - left, bottom - top)), width, height))
    x, y = (
        min(max(round((low + high - side) / 2), 0), length - side)
        for low, high, length in ((left, right, width), (top, bottom, height))
    )
    part = image[None, :, y : y + side, x : x + side]
    return F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]


def _shrunk(images: Tensor, transform: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures shrunk, with antialiasing, as far as the transform would shrink them, and the transform for those."""
    scale = float(transform[0, :, :2].det().abs().sqrt())
    if scale >= 1:
        return images, transform
    height, width = images.shape[-2:]
    small = max(1, round(height * scale)), max(1, round(width * scale))
    ratio = torch.tensor([small[1] / width, small[0] / height], dtype=torch.float64)
    # Whole numbers are pixel centres, so that the pictures' corners lie at -1/2.
    to_full = invert(torch.cat([torch.diag(ratio), ((ratio - 1) / 2)[:, None]], dim=1)[None])
    linear = transform[:, :, :2]
    composed = torch.cat([linear @ to_full[:, :, :2], linear @ to_full[:, :, 2:] + transform[:, :, 2:]], dim=2)
    return F.interpolate(images, size=small, mode="bilinear", antialias=True), composed
