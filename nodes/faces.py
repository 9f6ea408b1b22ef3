"""Faces cut out of pictures, as the lookahead encoder wants to see them."""

from pathlib import Path
from typing import get_args

import folder_paths
import torch
from comfy_api.latest import io

from ..models.errors import DatasetError, FormatError
from ..models.face_crops import Choice, Framing, choose_face, cut_face
from ..models.faces import LIKELY_NAMES, Provider, face_analyser, network_files, release_face_analysers
from ..trainers.pictures import Picture
from . import _host
from ._choices import first_refusal, known
from ._folders import FACE_MODELS

AUTO = "auto"
KEEP, LEAVE_OUT = "keep whole", "leave out"
FACELESS = (KEEP, LEAVE_OUT)


class FaceCropAndAlign(io.ComfyNode):
    """One face of each picture at a size and place of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeFaceCropAndAlign",
            display_name="Face Crop and Align",
            category="personalize/data",
            description="Finds a face in each picture with insightface, turns it upright and cuts it out as the "
            "LCM-Lookahead encoder saw faces in its training.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="One picture or a batch; the order is kept."),
                io.Combo.Input(
                    "model_folder",
                    options=[AUTO, *face_model_folders()],
                    default=AUTO,
                    tooltip="Folder in models/insightface with a face detector. auto takes buffalo_l if it is there. "
                    "Nothing is downloaded.",
                ),
                io.Combo.Input(
                    "framing",
                    options=list(get_args(Framing)),
                    default="aligned",
                    tooltip="aligned turns the face so that eyes and mouth are always in the same place. square cuts "
                    "around the face without turning it.",
                ),
                io.Float.Input(
                    "margin",
                    default=1.3,
                    min=1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How many times as much to show as the face takes up. The encoder was trained with aligned "
                    "faces at 1.3.",
                ),
                io.Int.Input(
                    "size", default=1024, min=64, max=2048, step=8, tooltip="Side of the square pictures, in pixels."
                ),
                io.Combo.Input(
                    "face",
                    options=list(get_args(Choice)),
                    default="largest",
                    tooltip="Which face, where a picture shows several.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=99,
                    tooltip="For by index: counted from the left, 0 is the left-most.",
                ),
                io.Float.Input(
                    "min_score",
                    default=0.5,
                    min=0.05,
                    max=0.99,
                    step=0.01,
                    tooltip="How certain the detector must be. Lower finds more, and now and then a face in a curtain.",
                ),
                io.Combo.Input(
                    "faceless",
                    options=list(FACELESS),
                    default=KEEP,
                    tooltip="Pictures without that face: kept whole, scaled and cropped at the centre, or left out of "
                    "the batch.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(get_args(Provider)),
                    default="auto",
                    tooltip="Where the detector runs. cuda needs the package onnxruntime-gpu; the CPU takes a fraction "
                    "of a second per picture.",
                ),
                io.Boolean.Input(
                    "keep_loaded",
                    default=True,
                    tooltip="Keep the detector in memory for the next run. Turn it off to have its memory back.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Squares of one size, in the order of the pictures."),
                io.Boolean.Output(display_name="found", tooltip="Whether every picture shows the face asked for."),
                io.Int.Output(display_name="count", tooltip="How many faces there are in all pictures together."),
                io.String.Output(display_name="report", tooltip="One line per picture: what was found and taken."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_folder=None, framing=None, face=None, faceless=None, device=None) -> bool | str:
        return first_refusal(
            [
                known("folder of face models", model_folder, [AUTO, *face_model_folders()]),
                known("framing", framing, get_args(Framing)),
                known("choice of a face", face, get_args(Choice)),
                known("treatment of faceless pictures", faceless, FACELESS),
                known("device", device, get_args(Provider)),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, model_folder=None, **_others) -> str:
        try:
            return "" if model_folder is None else _host.file_version(*network_files(_chosen_folder(model_folder)))
        except FormatError:
            return ""

    @classmethod
    def execute(
        cls, images, model_folder, framing, margin, size, face, index, min_score, faceless, device, keep_loaded=True
    ) -> io.NodeOutput:
        if not len(images):
            raise DatasetError("the batch of images is empty; connect at least one picture")
        pictures = [Picture.from_tensor(image, f"picture {n}") for n, image in enumerate(_host.image_list([images]), 1)]
        progress = _host.HostProgress(cls.hidden.unique_id, len(pictures))
        squares, lines, total, missed = [], [], 0, 0
        try:
            with _host.short_paths():
                analyser = face_analyser(_chosen_folder(model_folder), device)
                for picture in pictures:
                    opened = picture.open()
                    pixels = opened.cut(picture.size).pixels
                    (faces,) = analyser.detect([pixels], min_score)
                    chosen = choose_face(faces, face, index)
                    total += len(faces)
                    missed += chosen is None
                    if chosen is not None:
                        squares.append(cut_face(pixels, chosen, size, framing=framing, margin=margin))
                    elif faceless == KEEP:
                        squares.append(opened.cut(size).pixels)
                    lines.append(f"{picture.name}: {_said(faces, chosen, face, index, faceless)}")
                    progress.report(len(lines), len(pictures), lines[-1])
                    progress.raise_if_cancelled()
        finally:
            if not keep_loaded:
                release_face_analysers()
        if not squares:
            raise DatasetError(
                f"no face to take in any of {len(pictures)} pictures; lower min_score, choose another face, or set "
                f"faceless to {KEEP}"
            )
        batch = (torch.stack(squares).movedim(1, -1) / 2 + 0.5).clamp(0, 1)  # (pictures, size, size, channels)
        return io.NodeOutput(batch, missed == 0, total, "\n".join(lines))


def face_model_folders() -> dict[str, Path]:
    """Folders with ONNX files in the host's folder for insightface, by the names in the list."""
    found = {}
    for root in folder_paths.get_folder_paths(FACE_MODELS):
        for pattern in ("*.onnx", "*/*.onnx", "*/*/*.onnx"):
            for path in sorted(Path(root).glob(pattern)):
                found.setdefault(path.parent.relative_to(root).as_posix(), path.parent)
    return found


def _chosen_folder(name: str) -> Path:
    """The folder of that name, or for ``auto`` the one that looks most as if it held a detector."""
    folders = face_model_folders()
    if name != AUTO:
        if name not in folders:
            raise FormatError(f"there is no folder {name!r} with ONNX files in models/insightface; choose another one")
        return folders[name]
    likely = [
        folder
        for folder in folders.values()
        if any(path.name.startswith(LIKELY_NAMES["detection"]) for path in network_files(folder))
    ]
    if not likely:
        raise FormatError(
            "found no face detector in models/insightface; put det_10g.onnx, which finds faces, and w600k_r50.onnx, "
            "which tells them apart, of insightface's pack buffalo_l into models/insightface/buffalo_l"
        )
    return min(likely, key=lambda folder: folder.name != "buffalo_l")


def _said(faces: list, chosen, face: str, index: int, faceless: str) -> str:
    count = f"{len(faces)} face{'' if len(faces) == 1 else 's'}"
    if chosen is None:
        which = f", none with index {index}" if faces and face == "by index" else ""
        return f"{count}{which}; {'kept whole' if faceless == KEEP else 'left out'}"
    left, top, right, bottom = (round(edge) for edge in chosen.box)
    return f"{count}; took the one at ({left}, {top}), {right - left} x {bottom - top}, score {chosen.score:.2f}"
