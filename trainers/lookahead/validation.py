"""Grids of people while a training runs: what the encoder saw, and what it makes of prompts it knows and does not."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from ..progress import Progress
from ..sampling import to_pictures
from .batch import Batch, Batches
from .config import LookaheadConfig
from .data import TARGET_WORD, FaceData, filled
from .loading import Loaded
from .sampling import PersonSampler

COLUMNS = ("encoder input", "target", "training prompt", "validation prompt")
FEW_STEPS = ("training prompt, LCM", "validation prompt, LCM")
CELL, GAP, LINE = 224, 6, 17
"""Pixels: side of a picture with the gap around it, that gap, and height of a line of text."""
_LETTERS = 30
_INK, _PAPER = (40, 44, 52), (255, 255, 255)


@dataclass(frozen=True)
class _Person:
    batch: Batch
    """Of one row."""
    prompts: tuple[str, str]
    """One that is trained on, and one that is not."""
    target: bool
    """Whether the training has shown this person."""


class ValidationGrid:
    """Samples the same people, prompts and noise again and again, so that pictures of different steps compare.

    Draws from generators of its own: training takes the same course with and without it.
    """

    def __init__(
        self,
        config: LookaheadConfig,
        data: FaceData,
        loaded: Loaded,
        batches: Sequence[Batches],
        *,
        device: torch.device,
        progress: Progress,
    ):
        """Args: batches: of the data that is trained on and, where there is one, of its validation set."""
        self.last: Image.Image | None = None
        self._config, self._data, self._loaded, self._batches = config, data, loaded, batches
        self._device, self._progress = device, progress

    @torch.no_grad()
    def make(self, step: int) -> Image.Image | None:
        """A row for each person with the weights as they are now; None when the user cancels meanwhile."""
        sampler = PersonSampler(self._config, self._loaded, self._device, self._progress)
        few_step = bool(self._config.lookahead_every)
        rows = []
        for number, person in enumerate(self._people()):
            reference, target = (to_pictures(pixels)[0] for pixels in (person.batch.references, person.batch.targets))
            told = person.batch.reference_prompts[0]
            cells = [(reference, told), (target, person.prompts[0]) if person.target else (None, "")]
            for few in (False, True) if few_step else (False,):
                for prompt in person.prompts:
                    pixels = sampler.sample(person.batch.rows, prompt, self._config.seed + number, few_step=few)
                    if pixels is None:
                        return None
                    cells.append((to_pictures(pixels)[0], prompt))
            rows.append(cells)
        self.last = draw_grid(COLUMNS + (FEW_STEPS if few_step else ()), rows)
        return self.last

    def _people(self) -> list[_Person]:
        known = sorted({picture.prompt for one in self._data.sets for picture in one.pictures})
        unknown = self._data.settings.validation_prompts
        people = []
        for seen, data, batches in zip((True, False), (self._data, self._data.validation), self._batches):
            for index in data.spread(self._config.preview_people):
                batch = batches.fixed([index], torch.zeros(1, dtype=torch.long), self._config.seed)
                place = len(people)
                prompt = batch.prompts[0] if seen else filled(known[place % len(known)], TARGET_WORD)
                people.append(_Person(batch, (prompt, unknown[place % len(unknown)]), seen))
        return people


def draw_grid(
    titles: Sequence[str], rows: Sequence[Sequence[tuple[Image.Image | None, str]]], side: int = CELL
) -> Image.Image:
    """Pictures with what they were made of below them; a title above each column.

    Args: rows: of pictures, or None for an empty place, and captions.
    """
    lines = [[textwrap.wrap(caption, _LETTERS)[:4] for _, caption in row] for row in rows]
    heights = [side + LINE * max(1, *map(len, row)) + LINE // 2 for row in lines]
    sheet = Image.new("RGB", (side * len(titles), LINE * 2 + sum(heights)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((side * column + side // 2, LINE), title, fill=_INK, font=font, anchor="mm")
    top = LINE * 2
    for cells, texts, height in zip(rows, lines, heights, strict=True):
        for column, ((picture, _), words) in enumerate(zip(cells, texts, strict=True)):
            if picture is not None:
                shown = picture.resize((side - GAP, side - GAP), Image.Resampling.BILINEAR)
                sheet.paste(shown, (side * column + GAP // 2, top + GAP // 2))
            for number, line in enumerate(words):
                place = (side * column + side // 2, top + side + LINE * number + LINE // 2)
                draw.text(place, line, fill=_INK, font=font, anchor="mm")
        top += height
    return sheet
