"""The node of a dataset: pictures and captions gathered on the canvas or from a folder."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..models.errors import DatasetError
from ..models.tokens import LearnedToken
from ..trainers.dataset import Dataset
from . import _host, _input_folder, _sockets
from ._choices import single
from ._lines import lines_or_strings

NO_FOLDER = "(none)"
_THUMBNAIL = 256


class PersonalizationDataset(io.ComfyNode):
    """Pictures, captions and learned tokens as one dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = [NO_FOLDER, *_input_folder.picture_folders()]
        return io.Schema(
            node_id="PersonalizePersonalizationDataset",
            display_name="Personalization Dataset",
            category="personalize/data",
            description="Gathers what a training learns from. Pictures come from Training Picture nodes, from a "
            "folder inside ComfyUI's input folder, or from an IMAGE batch or list.",
            is_input_list=True,
            inputs=[
                io.String.Input(
                    "token",
                    default="<dog>",
                    tooltip="The new word to learn, in angle brackets; several separated by commas. Empty learns no "
                    "word, as for a style.",
                ),
                io.String.Input(
                    "initializer",
                    default="dog",
                    tooltip="The ordinary word that the token starts from, one per token, separated by commas.",
                ),
                io.Int.Input(
                    "rows_per_token",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="Embedding vectors per token. The DCO authors use 1; more hold more detail and use up "
                    "more of the prompt's 75 places.",
                ),
                io.Combo.Input(
                    "folder",
                    options=folders,
                    default=NO_FOLDER,
                    tooltip="A folder inside the input folder. Captions come from text files beside the pictures "
                    "(cat.jpg, cat.txt), or from a config.json in the DCO authors' layout.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="For a folder or IMAGE batch: one line per picture, or one line for all. Empty reads the "
                    "text files of the folder.",
                ),
                io.String.Input(
                    "base_captions",
                    default="",
                    multiline=True,
                    tooltip="The same in ordinary words, one line per picture. Empty replaces each token by its "
                    "initializer word.",
                ),
                io.Combo.Input(
                    "class_folder",
                    options=folders,
                    default=NO_FOLDER,
                    tooltip="Prior preservation: a folder of ordinary pictures of the same class, to keep the model "
                    "from forgetting what a dog is.",
                ),
                io.String.Input(
                    "class_caption",
                    default="",
                    tooltip="Caption of the class pictures. Empty reads text files beside them.",
                ),
                _sockets.Pictures.Input("pictures", optional=True, tooltip="The last Training Picture of a chain."),
                io.Image.Input("images", optional=True, tooltip="A batch or a list of pictures, any sizes."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per picture of images, white where the picture counts. Load Image gives the "
                    "opposite: put Invert Mask between.",
                ),
            ],
            outputs=[
                _sockets.Dataset.Output(display_name="dataset"),
                io.Image.Output(display_name="preview", tooltip="Thumbnails of the pictures, as a batch."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder=None, class_folder=None) -> bool | str:
        try:
            for name in single(folder), single(class_folder):
                if name not in (None, "", NO_FOLDER):
                    _input_folder.folder_path(str(name))
        except DatasetError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, class_folder=None, **_others) -> str:
        return "|".join(
            _input_folder.folder_version(name) for name in map(single, (folder, class_folder)) if name != NO_FOLDER
        )

    @classmethod
    def execute(
        cls,
        token,
        initializer,
        rows_per_token,
        folder,
        captions,
        base_captions,
        class_folder,
        class_caption,
        pictures=None,
        images=None,
        masks=None,
    ) -> io.NodeOutput:
        folder, class_folder = folder[0] or NO_FOLDER, class_folder[0] or NO_FOLDER
        tokens = _tokens(token[0], initializer[0], rows_per_token[0])
        captions, base_captions = lines_or_strings(captions), lines_or_strings(base_captions)
        sources = [folder != NO_FOLDER, pictures is not None, images is not None]
        if not any(sources):
            raise DatasetError("there are no pictures; choose a folder, or connect Training Picture or images")
        if sum(sources) != 1:
            raise DatasetError(
                f"pictures come from {sum(sources)} places (folder, Training Picture, images); connect or choose "
                "exactly one"
            )
        if masks is not None and images is None:
            raise DatasetError(
                "masks are connected without images; a folder's masks belong in its sub-folder mask, under the "
                "pictures' names"
            )
        with _host.short_paths():
            if folder != NO_FOLDER:
                dataset = Dataset.from_folder(
                    _input_folder.folder_path(folder),
                    tokens=tokens or None,
                    captions=captions or None,
                    base_captions=base_captions or None,
                    within=Path(folder_paths.get_input_directory()),
                )
            elif images is not None:
                dataset = Dataset.from_tensors(
                    _host.image_list(images),
                    captions,
                    base_captions=base_captions or None,
                    masks=None if masks is None else _host.mask_list(masks),
                    tokens=tokens,
                )
            else:
                examples = [example for chain in pictures for example in chain]
                dataset = Dataset.build(
                    [example.picture for example in examples],
                    captions or [example.caption for example in examples],
                    base_captions=base_captions or [example.base_caption or None for example in examples],
                    masks=[example.mask for example in examples],
                    tokens=tokens,
                )
            if class_folder != NO_FOLDER:
                dataset = dataset.with_class_folder(
                    _input_folder.folder_path(class_folder), class_caption[0].strip() or None
                )
            return io.NodeOutput(dataset, dataset.preview(_THUMBNAIL))


def _tokens(triggers: str, initializers: str, rows: int) -> tuple[LearnedToken, ...]:
    names = [name.strip() for name in triggers.split(",") if name.strip()]
    words = [word.strip() for word in initializers.split(",")] if names else []
    if len(words) != len(names):
        raise DatasetError(
            f"there are {len(names)} tokens and {len(words)} initializer words; give one word per token, separated "
            "by commas"
        )
    return tuple(LearnedToken(name, word, rows) for name, word in zip(names, words, strict=True))
