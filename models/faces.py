"""Faces found and told apart by insightface's networks, read from a folder on disk: nothing is ever downloaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import FormatError, MissingDependencyError

Provider = Literal["auto", "cpu", "cuda"]
Task = Literal["detection", "recognition"]

EMBEDDING_WIDTH = 512
LIKELY_NAMES: dict[Task, tuple[str, ...]] = {
    "detection": ("det_", "scrfd"),
    "recognition": ("w600k", "glint", "arcface", "ms1m", "webface"),
}
"""How insightface's files for a task begin. They are tried first, since opening one may mean reading 500 MB."""

_WANTED: dict[Task, str] = {
    "detection": "a face detector such as det_10g.onnx",
    "recognition": "a face recognition network such as w600k_r50.onnx",
}
_MAX_ASPECT = 128
"""Sides of a picture beyond which the shorter one vanishes where insightface shrinks the picture to 128 pixels."""


@dataclass(frozen=True)
class Face:
    """One face in a picture; positions are pixels of that picture."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom; parts of it may lie outside the picture."""
    landmarks: Tensor | None
    """Eyes, nose tip and mouth corners as (x, y), left to right as seen, (5, 2); None from detectors without them."""
    score: float
    """How certain the detector is, 0..1."""


class FaceAnalyser:
    """The networks of one folder, each opened when it is first needed.

    Args:
        folder: holds ONNX files of insightface, such as those of its pack buffalo_l, or one of its packs with a
            manifest.
        provider: "auto" lets insightface choose among what the installed onnxruntime offers.
    """

    def __init__(self, folder: Path, provider: Provider = "auto"):
        self.folder = folder
        self.provider = provider
        self._networks: dict[Task, Any] = {}

    def detect(self, images: Iterable[Tensor], min_score: float = 0.5) -> list[list[Face]]:
        """The faces of each picture, the most certain first.

        Args:
            images: (3, height, width) each, in -1..1, of any sizes; a batch will do.
            min_score: 0..1; what the detector is less certain of is left out.

        Raises:
            FormatError: the folder holds no detector that works.
            MissingDependencyError: insightface is not installed, or onnxruntime cannot use CUDA.
        """
        return [self._detect_one(image, min_score) for image in images]

    def embed(self, images: Sequence[Tensor], faces: Sequence[Face]) -> Tensor:
        """Who it is, as a unit vector: the inner product of two is the similarity of the faces.

        Args:
            images: (3, height, width) each, in -1..1.
            faces: one per picture, with landmarks: insightface turns them upright and cuts out 112 pixels.

        Returns:
            (faces, 512), float32, on the CPU.

        Raises:
            FormatError: the folder holds no recognition network that works, or a face has no landmarks.
            MissingDependencyError: as for ``detect``.
        """
        if any(face.landmarks is None for face in faces):
            raise FormatError(
                f"{self.folder.name}: its detector gives no landmarks, which recognition needs; use det_10g.onnx"
            )
        rows = [torch.empty(0, EMBEDDING_WIDTH)]
        for image, face in zip(images, faces, strict=True):
            found = SimpleNamespace(kps=face.landmarks.numpy())
            rows.append(torch.from_numpy(self._network("recognition").get(_bgr(image), found))[None].float())
        return F.normalize(torch.cat(rows), dim=1)

    def _detect_one(self, image: Tensor, min_score: float) -> list[Face]:
        height, width = image.shape[-2:]
        if max(height, width) > _MAX_ASPECT * min(height, width):
            return []
        boxes, landmarks = self._network("detection").detect(_bgr(image), det_thresh=min_score)
        points = [None] * len(boxes) if landmarks is None else torch.from_numpy(landmarks).float()
        faces = [Face(tuple(box[:4].tolist()), p, float(box[4])) for box, p in zip(boxes, points)]
        return [face for face in faces if _is_plausible(face)]

    def _network(self, task: Task) -> Any:
        if task not in self._networks:
            self._networks[task] = self._open(task)
        return self._networks[task]

    def _open(self, task: Task) -> Any:
        """The first network for the task that works, or one sentence on why there is none."""
        zoo = _model_zoo()
        providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
        options = {
            "providers": providers.get(self.provider, zoo.get_default_providers()),
            "sess_options": _session_options(),
        }
        if zoo.has_model_package_manifest(self.folder):
            sources, options["model_task"] = [self.folder], task
        else:
            sources = sorted(
                network_files(self.folder), key=lambda path: (not path.name.startswith(LIKELY_NAMES[task]), path.name)
            )
        broken = []
        for source in sources:
            try:
                network = zoo.get_model(str(source.absolute()), **options)
                if network is None or network.taskname != task:
                    continue
                _try_out(network)
            # onnxruntime, protobuf and insightface raise each their own, down to AssertionError and KeyError.
            except Exception as error:
                said = (str(error).strip() or repr(error)).splitlines()[0]
                broken.append(f"{source.name} ({said.replace(str(source.absolute()), source.name)})")
                continue
            if self.provider == "cuda" and "CUDAExecutionProvider" not in network.session.get_providers():
                raise MissingDependencyError(
                    "the installed onnxruntime cannot use CUDA here; put the package onnxruntime-gpu in its place, or "
                    "choose auto or cpu"
                )
            return network
        why = f"; could not use {', '.join(broken)}" if broken else ""
        raise FormatError(
            f"{self.folder.name}: found {_names(sources)}, expected {_WANTED[task]}{why}; put that file of "
            "insightface's pack buffalo_l there"
        )


def network_files(folder: Path) -> list[Path]:
    """The ONNX files in a folder."""
    return sorted(folder.glob("*.onnx"))


def face_analyser(folder: Path, provider: Provider = "auto") -> FaceAnalyser:
    """The analyser of a folder, opened once and kept until release_face_analysers or until its files change."""
    status = [(path.name, path.stat()) for path in network_files(folder)]
    return _kept(folder, provider, tuple((name, file.st_mtime_ns, file.st_size) for name, file in status))


def release_face_analysers() -> None:
    """Give back the memory of all networks that are kept."""
    _kept.cache_clear()


@lru_cache(maxsize=2)
def _kept(folder: Path, provider: Provider, _files: tuple) -> FaceAnalyser:
    return FaceAnalyser(folder, provider)


def _model_zoo() -> Any:
    try:
        import insightface
        from insightface import model_zoo
    except ImportError as error:
        raise MissingDependencyError(
            f"faces are found by the package insightface 2.1 or newer, which cannot be imported ({error}); install it "
            "into the Python that runs ComfyUI"
        ) from error
    if int(insightface.__version__.split(".")[0]) < 2:
        raise MissingDependencyError(
            f"found insightface {insightface.__version__}, expected 2.1 or newer; update it in the Python that runs "
            "ComfyUI"
        )
    return model_zoo


def _session_options() -> Any:
    import onnxruntime  # insightface needs it, so it is there

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait for work would take the processor from the host.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _try_out(network: Any) -> None:
    """Fail now where a file only looks like the network that was asked for."""
    black = np.zeros((112, 112, 3), np.uint8)
    if network.taskname == "detection":
        network.detect(black)
    elif (shape := network.get_feat(black).shape) != (1, EMBEDDING_WIDTH):
        raise ValueError(f"it gives {shape} for one face, not (1, {EMBEDDING_WIDTH})")


def _is_plausible(face: Face) -> bool:
    """False for what is smaller than a pixel or has its landmarks on one point, as noise may give."""
    left, top, right, bottom = face.box
    points = face.landmarks
    spread = points is None or (torch.isfinite(points).all() and (points.amax(0) - points.amin(0) >= 1).all())
    return bool(right - left >= 1 and bottom - top >= 1 and spread)


def _bgr(image: Tensor) -> np.ndarray:
    """(3, height, width) in -1..1 -> (height, width, 3) in 0..255, the channels as OpenCV orders them."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.flip(0).permute(1, 2, 0).numpy())


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths) or "no ONNX files"
