"""What networks say of made pictures: the measures behind Personalization Scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.errors import ConfigError, IncompatibleModelError
from ..models.face_crops import choose_face
from ..models.faces import FaceAnalyser
from ..models.lookahead.identity import trim_long
from ..models.similarity import Score, matched_similarity, mean_similarity
from ..trainers.pictures import OpenPicture
from ..trainers.scoring import load_clip_judge, load_dino_judge
from . import _host
from .clip_embeddings import text_target

CLIP_I, CLIP_T, DINO, FACE = MEASURES = ("CLIP-I", "CLIP-T", "DINO", "face")
AT_ONCE = 16
"""Pictures that a network sees at a time."""

Embed = Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class Sitting:
    """The pictures to be judged, and who hears how far the judging is."""

    made: Sequence[Image.Image]
    real: Sequence[Image.Image]
    prompts: Sequence[str]
    advance: Callable[[int, str], None]
    """Called with how many more pictures were seen, and by which measure; raises when the user cancels."""

    def __post_init__(self) -> None:
        if not self.made or not self.real:
            raise ConfigError("there are no pictures to compare; connect at least one to images and to references")
        if len(self.prompts) not in (0, 1, len(self.made)):
            raise ConfigError(
                f"found {len(self.prompts)} prompts for {len(self.made)} images; write one line for all of them, or "
                "one line for each"
            )

    def embedded(self, pictures: Sequence[Image.Image], embed: Embed, measure: str) -> Tensor:
        """The embeddings of pictures, (pictures, dim), on the CPU."""
        rows = []
        for first in range(0, len(pictures), AT_ONCE):
            rows.append(embed(pictures[first : first + AT_ONCE]))
            self.advance(len(rows[-1]), measure)
        return _finite(torch.cat(rows), measure)


def scores_by_folder(sitting: Sitting, folder: Path) -> list[Score]:
    """CLIP-I and CLIP-T by a CLIP in transformers' layout; its tokenizer is the host's where the folder has none."""
    judge = load_clip_judge(folder, _host.tokenizer_folder())
    judge.network.to(_host.device_with_room(judge.network))
    texts = judge.embed_texts(sitting.prompts) if sitting.prompts else None
    return _clip_scores(sitting, judge.embed_images, texts)


def scores_by_host(sitting: Sitting, clip_vision, clip) -> list[Score]:
    """CLIP-I and CLIP-T by the host's CLIP_VISION and, unless it is None, CLIP."""
    projection = getattr(clip_vision.model, "visual_projection", None)
    if not isinstance(projection, nn.Module):
        raise IncompatibleModelError(
            "this CLIP Vision model is no CLIP: it has no projection into the space of pictures and words; load a "
            "CLIP-ViT with Load CLIP Vision"
        )
    texts = None
    if sitting.prompts and clip is not None:
        texts = torch.cat([_words(clip, prompt) for prompt in sitting.prompts])
        if (width := projection.weight.shape[0]) != texts.shape[1]:
            raise IncompatibleModelError(
                f"this CLIP describes words by {texts.shape[1]} numbers and this CLIP Vision pictures by {width}, so "
                "they were not trained together; for SDXL load CLIP-ViT-bigG, for SD2.1 CLIP-ViT-H, or choose a "
                "clip_folder"
            )

    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        alike = len({picture.size for picture in pictures}) == 1
        batches = [pictures] if alike else [[picture] for picture in pictures]
        encoded = [clip_vision.encode_image(_shown(batch)) for batch in batches]
        return torch.cat([each["image_embeds"] for each in encoded]).float().cpu()

    return _clip_scores(sitting, embed, texts, "connect clip, or choose a clip_folder in place of clip_vision")


def dino_score(sitting: Sitting, folder: Path) -> list[Score]:
    """Similarity of class tokens by a network of DINO's kind in transformers' layout."""
    judge = load_dino_judge(folder)
    judge.network.to(_host.device_with_room(judge.network))
    made, real = (sitting.embedded(pictures, judge.embed_images, DINO) for pictures in (sitting.made, sitting.real))
    return [_score(DINO, mean_similarity(made, real))]


def face_score(sitting: Sitting, folder: Path) -> list[Score]:
    """Similarity of the largest faces by insightface; pictures without a face are left out and counted."""
    analyser = FaceAnalyser(folder)

    def faces_of(pictures: Sequence[Image.Image]) -> list[Tensor | None]:
        rows = []
        for picture in pictures:
            pixels = OpenPicture(picture).cut((picture.height, picture.width)).pixels
            face = choose_face(analyser.detect([pixels])[0])
            rows.append(None if face is None else _finite(analyser.embed([pixels], [face])[0], FACE))
            sitting.advance(1, FACE)
        return rows

    made, real = faces_of(sitting.made), faces_of(sitting.real)
    shown, known = ([row for row in rows if row is not None] for rows in (made, real))
    faceless = [
        f"{len(rows) - len(found)} of {len(rows)} {what}"
        for rows, found, what in ((made, shown, "images"), (real, known, "references"))
        if len(found) < len(rows)
    ]
    note = f"no face in {' and '.join(faceless)}" if faceless else ""
    if not shown or not known:
        return [Score(FACE, note=note)]
    similar = iter(mean_similarity(torch.stack(shown), torch.stack(known)).tolist())
    values = tuple(None if row is None else next(similar) for row in made)
    return [Score(FACE, values, f"{note}, left out" if note else "")]


def _clip_scores(sitting: Sitting, embed: Embed, texts: Tensor | None, advice: str = "") -> list[Score]:
    made, real = (sitting.embedded(pictures, embed, CLIP_I) for pictures in (sitting.made, sitting.real))
    scores = [_score(CLIP_I, mean_similarity(made, real))]
    if texts is not None:
        return [*scores, _score(CLIP_T, matched_similarity(made, _finite(texts, CLIP_T)))]
    return [*scores, Score(CLIP_T, note=advice if sitting.prompts else "there are no prompts")]


def _shown(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as the host holds them; ends that CLIP does not see would cost memory."""
    return trim_long(_host.pictures_to_images(pictures).movedim(-1, 1)).movedim(1, -1)


def _score(name: str, values: Tensor) -> Score:
    return Score(name, tuple(values.tolist()))


def _words(clip, prompt: str) -> Tensor:
    """The host's CLIP's embedding of a prompt in the space that it shares with pictures, (1, dim)."""
    try:
        return text_target(clip, prompt).cpu()
    except IncompatibleModelError as error:
        raise IncompatibleModelError(
            "this CLIP was saved without its projection, so its words cannot be compared with pictures, as is usual "
            "for SD1.5; connect the CLIP of an SDXL or SD2.1 checkpoint, or choose a clip_folder"
        ) from error


def _finite(embeddings: Tensor, measure: str) -> Tensor:
    if not embeddings.isfinite().all():
        raise IncompatibleModelError(
            f"{measure}: the network answers with values that are no numbers; its files are damaged, or it overflows "
            "in half precision: download it again, or start ComfyUI with --fp32-text-enc"
        )
    return embeddings
