"""A turn's random numbers turned into tensors: rows of pictures and prompts, timesteps, and what is dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...models.lookahead import draw_timesteps, importance
from ..conditioning import Conditioning
from ..ranks import Ranks
from ..text import PromptEmbeds
from .config import LookaheadConfig
from .data import FaceData
from .iterations import Turn
from .pictures import Encoded, PictureReader
from .step import Rows, Uniform


@dataclass(frozen=True)
class Batch:
    """One forward pass of this process."""

    rows: Rows
    """On the training's device."""
    timesteps: Tensor
    """(batch,), on the CPU."""
    dropped: Tensor | None
    """Rows whose adapter sees nobody, (batch,)."""
    uniform: Uniform
    targets: Tensor
    """(batch, 3, side, side) in -1..1, on the CPU; the references likewise."""
    references: Tensor
    landmarks: list[Tensor | None]
    """Of the references' faces."""
    prompts: list[str]


class Batches:
    """Makes the batch of a turn. Every process draws for all of them and keeps its own rows."""

    def __init__(
        self,
        config: LookaheadConfig,
        data: FaceData,
        reader: PictureReader,
        places: Mapping[str, int],
        embeds: PromptEmbeds,
        ranks: Ranks,
        device: torch.device,
    ):
        """Args: places: prompt -> its row of ``embeds``; the empty prompt is there too."""
        self._config, self._data, self._reader = config, data, reader
        self._places, self._embeds, self._ranks, self._device = places, embeds, ranks, device

    def make(self, turn: Turn, timesteps: int) -> Batch:
        """Args: timesteps: of the noise schedule."""
        config, ranks = self._config, self._ranks
        mine = slice(config.batch_size * ranks.index, config.batch_size * (ranks.index + 1))
        shared, own = turn.rows_generator(), turn.half_generator()
        seeds = torch.randint(2**62, (len(turn.indices),), generator=shared).tolist()
        rows = [self._row(index, seed) for index, seed in list(zip(turn.indices, seeds))[mine]]
        if turn.ahead:
            rows = rows[: config.lookahead_batch_size]
        chances = importance(timesteps, config.timestep_alpha)
        if turn.ahead:
            chances = importance(config.lookahead_max_timestep, config.lookahead_alpha)
        drawn, dropped = torch.rand(2, len(turn.indices), generator=own, dtype=torch.float64)[:, mine][:, : len(rows)]
        drops = torch.Generator().manual_seed(int(torch.randint(2**61, (), generator=own)) + ranks.index)
        targets, references, noise, prompts, reference_prompts, latents, reference_latents = map(list, zip(*rows))
        return Batch(
            Rows(
                self._stack(latents),
                self._stack(noise),
                self._stack(reference_latents),
                self._told(prompts),
                self._told(reference_prompts),
                self._stack([one.features for one in references]),
                self._reader.nobody.to(self._device),
            ),
            draw_timesteps(chances, drawn),
            None if turn.ahead else dropped < config.adapter_drop_chance,
            lambda block, tokens: torch.rand(tokens, generator=drops),
            torch.stack([one.pixels for one in targets]),
            torch.stack([one.pixels for one in references]),
            [one.landmarks for one in references],
            prompts,
        )

    def _row(self, index: int, seed: int) -> tuple[Encoded, Encoded, Tensor, str, str, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        pair = self._data.pair(index, generator)
        wordless = bool(torch.rand((), generator=generator) < self._config.text_drop_chance)
        target, reference = self._reader.target(pair.target, generator), self._reader.reference(pair, generator)
        latents, reference_latents = target.latents(generator), reference.latents(generator)
        noise = torch.randn(latents.shape, generator=generator)
        prompts = ("", "") if wordless else (pair.prompt, pair.reference_prompt)
        return target, reference, noise, *prompts, latents, reference_latents

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(parts).to(self._device)

    def _told(self, prompts: Sequence[str]) -> Conditioning:
        told = self._embeds[[self._places[prompt] for prompt in prompts]].to(self._device)
        side = float(self._reader.side)
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=self._device)
        return Conditioning(told.embeds, told.pooled, time_ids)


def picture_row(columns: Sequence[Tensor], largest: int = 256) -> Image.Image:
    """Batches of pictures (batch, 3, side, side) in -1..1 side by side, a row for each of at most four."""
    count = min(4, *(len(column) for column in columns))
    grid = torch.cat([torch.cat([*column[:count]], dim=1) for column in columns], dim=2)
    levels = ((grid.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(levels.numpy()))
    side = columns[0].shape[-1]
    if side > largest:
        picture = picture.resize((len(columns) * largest, count * largest), Image.Resampling.BILINEAR)
    return picture
