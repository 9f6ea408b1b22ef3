"""One picture of a training set with its caption, on the canvas."""

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..models.errors import DatasetError
from ..trainers.dataset import Example
from ..trainers.layouts import is_inside
from ..trainers.pictures import Picture
from . import _host, _sockets


class TrainingPicture(io.ComfyNode):
    """One picture with its caption; chain as many as there are pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        root = folder_paths.get_input_directory()
        files = [name for name in folder_paths.filter_files_content_types(_files(root), ["image"])]
        return io.Schema(
            node_id="PersonalizeTrainingPicture",
            display_name="Training Picture",
            category="personalize/data",
            description="Adds one picture and its caption to a training set. Chain one node per picture and end "
            "with Personalization Dataset.",
            inputs=[
                io.Combo.Input(
                    "image",
                    options=sorted(files),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="Drop a picture here. Transparent parts are left out of methods that use masks.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="Describe the whole picture, background and style too, with your token where the subject "
                    "is named: a photo of a <dog> on a street, in front of lush trees.",
                ),
                io.String.Input(
                    "base_caption",
                    default="",
                    multiline=True,
                    tooltip="The same in ordinary words. Empty replaces each token by its initializer word.",
                ),
                _sockets.Pictures.Input("pictures", optional=True, tooltip="The Training Picture before this one."),
            ],
            outputs=[_sockets.Pictures.Output(display_name="pictures")],
        )

    @classmethod
    def fingerprint_inputs(cls, image, **_others) -> str:
        try:
            return _host.file_version(_picture_path(image)) if image else ""
        except DatasetError:
            return ""

    @classmethod
    def validate_inputs(cls, image) -> bool | str:
        if image is None:  # linked: known when the node runs
            return True
        try:
            _picture_path(str(image))
        except DatasetError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, image, caption, base_caption="", pictures=None) -> io.NodeOutput:
        with _host.short_paths():
            picture = Picture.from_file(_picture_path(image))
        example = Example(picture, caption.strip(), base_caption.strip())
        return io.NodeOutput((*(pictures or ()), example))


def _files(root: str) -> list[str]:
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_file()]


def _picture_path(name: str) -> Path:
    """The picture of that name in the input folder, or in the one that its ending such as [output] names.

    DatasetError when it leads out of that folder or is not there: names arrive over the network in workflows.
    """
    plain, root = folder_paths.annotated_filepath(name)
    root = Path(root or folder_paths.get_input_directory())
    path = Path(os.path.abspath(root / plain))
    if not is_inside(path, root) or not path.is_file():
        raise DatasetError(f"picture {name!r} is not in the {root.name} folder; drop it on the node again")
    return path
