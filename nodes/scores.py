"""How well pictures keep a subject and follow their prompts, in the numbers that papers report."""

from comfy_api.latest import io, ui

from ..models.errors import ConfigError
from ..models.faces import network_files
from ..models.similarity import Score, score_table
from ..trainers.network_folders import folder_files
from ..trainers.pictures import Picture
from ..trainers.plots import score_chart
from . import _host
from ._choices import first_refusal, single
from ._folders import JUDGES
from ._lines import lines_or_strings
from ._network_folders import NONE, chosen_folder, folder_input, known_folder, network_folders
from .faces import face_model_folders
from .scoring import (
    CLIP_I,
    CLIP_T,
    DINO,
    FACE,
    MEASURES,
    Sitting,
    dino_score,
    face_score,
    scores_by_folder,
    scores_by_host,
)


class PersonalizationScores(io.ComfyNode):
    """CLIP-I, CLIP-T, DINO and face similarity of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePersonalizationScores",
            display_name="Personalization Scores",
            category="personalize/measuring",
            description="Measures how much pictures look like the training pictures (CLIP-I, DINO, face) and how well "
            "they follow their prompts (CLIP-T), as personalization papers report it.",
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The pictures that were made: a batch or a list."),
                io.Image.Input("references", tooltip="The training pictures of the subject: a batch or a list."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="For CLIP-T: what the images should show, in ordinary words (dog, not a learned token). "
                    "One line per image, or one line for all.",
                ),
                folder_input(
                    "clip_folder",
                    network_folders(JUDGES, "clip"),
                    "For CLIP-I and CLIP-T: a CLIP in transformers' layout, a folder in models/scoring. Papers "
                    "mostly use openai/clip-vit-base-patch32 or clip-vit-large-patch14.",
                ),
                folder_input(
                    "dino_folder",
                    network_folders(JUDGES, "dino"),
                    "For DINO: DINO or DINOv2 in transformers' layout, a folder in models/scoring. DreamBooth "
                    "uses facebook/dino-vits16.",
                ),
                folder_input(
                    "face_folder",
                    face_model_folders(),
                    "For face: a folder in models/insightface with a face detector and a recognition network, "
                    "such as buffalo_l.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For CLIP-I without a clip_folder: a CLIP-ViT from Load CLIP Vision.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For CLIP-T with clip_vision: the text encoder that was trained with it, which is SDXL's "
                    "for CLIP-ViT-bigG and SD2.1's for CLIP-ViT-H; SD1.5's has no projection.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="clip_i", tooltip="Mean over all pairs; 0 when it was not measured."),
                io.Float.Output(display_name="clip_t", tooltip="Mean over the images; 0 when it was not measured."),
                io.Float.Output(display_name="dino", tooltip="Mean over all pairs; 0 when it was not measured."),
                io.Float.Output(display_name="face", tooltip="Mean over the faces; 0 when it was not measured."),
                io.String.Output(display_name="table", tooltip="Each image's scores and the means, in Markdown."),
                io.Image.Output(display_name="plot", tooltip="The same as points; lines are the means."),
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_folder=None, dino_folder=None, face_folder=None) -> bool | str:
        return first_refusal(
            [
                known_folder("CLIP folder", single(clip_folder), network_folders(JUDGES, "clip")),
                known_folder("DINO folder", single(dino_folder), network_folders(JUDGES, "dino")),
                known_folder("folder of face models", single(face_folder), face_model_folders()),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, clip_folder=None, dino_folder=None, face_folder=None, **_others) -> str:
        judges = network_folders(JUDGES, "clip") | network_folders(JUDGES, "dino")
        files = [folder_files(judges[name]) for one in (clip_folder, dino_folder) if (name := single(one)) in judges]
        faces = face_model_folders().get(single(face_folder))
        return _host.file_version(*(path for some in files for path in some), *(network_files(faces) if faces else ()))

    @classmethod
    def execute(
        cls, images, references, prompts, clip_folder, dino_folder, face_folder, clip_vision=None, clip=None
    ) -> io.NodeOutput:
        clip_folder, dino_folder, face_folder = (single(one) for one in (clip_folder, dino_folder, face_folder))
        clip_vision, clip = single(clip_vision), single(clip)
        _check_choice(clip_folder, dino_folder, face_folder, clip_vision, clip)
        measures = []
        with _host.short_paths():
            if clip_folder != NONE:
                measures.append((scores_by_folder, chosen_folder(network_folders(JUDGES, "clip"), clip_folder)))
            elif clip_vision is not None:
                measures.append((scores_by_host, clip_vision, clip))
            if dino_folder != NONE:
                measures.append((dino_score, chosen_folder(network_folders(JUDGES, "dino"), dino_folder)))
            if face_folder != NONE:
                measures.append((face_score, chosen_folder(face_model_folders(), face_folder)))
            sitting = _sitting(cls.hidden.unique_id, images, references, lines_or_strings(prompts), len(measures))
            found = {}
            for measure, *arguments in measures:
                # Each network is gone before the next one comes.
                with _host.memory_given_back():
                    found |= {score.name: score for score in measure(sitting, *arguments)}
        scores = [found.get(name, Score(name, note=_ADVICE[name])) for name in MEASURES]
        table = score_table(scores, len(sitting.made))
        chart = score_chart({score.name: score.values for score in scores}, title="Personalization scores")
        plot = _host.pictures_to_images([chart])
        shown = {"text": [table], **ui.PreviewImage(plot, cls=cls).as_dict()}
        return io.NodeOutput(*(score.mean or 0.0 for score in scores), table, plot, ui=shown)


_ADVICE = {
    CLIP_I: "choose a clip_folder, or connect clip_vision",
    CLIP_T: "choose a clip_folder, or connect clip_vision and clip",
    DINO: "choose a dino_folder",
    FACE: "choose a face_folder",
}
"""What a measure needs that nobody chose."""


def _check_choice(clip_folder: str, dino_folder: str, face_folder: str, clip_vision, clip) -> None:
    if clip_folder != NONE and (clip_vision is not None or clip is not None):
        raise ConfigError(
            f"CLIP is there twice: the clip_folder {clip_folder} and what is connected; set clip_folder to {NONE}, or "
            "disconnect clip_vision and clip"
        )
    if clip is not None and clip_vision is None:
        raise ConfigError("clip is connected without clip_vision, which sees the pictures; connect both")
    if clip_folder == dino_folder == face_folder == NONE and clip_vision is None:
        raise ConfigError(
            "there is nothing to measure with: choose a clip_folder, a dino_folder or a face_folder, or connect "
            "clip_vision"
        )


def _sitting(node_id: str | None, images: list, references: list, prompts: list[str], measures: int) -> Sitting:
    made, real = (
        [Picture.from_tensor(one, f"{what} {n}").open().rgb for n, one in enumerate(_host.image_list(batches), 1)]
        for what, batches in (("image", images), ("reference", references))
    )
    total, seen = measures * (len(made) + len(real)), 0
    progress = _host.HostProgress(node_id, total)

    def advance(count: int, measure: str) -> None:
        nonlocal seen
        seen += count
        progress.report(seen, total, f"{measure}: {seen} of {total}")
        progress.raise_if_cancelled()

    return Sitting(made, real, prompts, advance)
