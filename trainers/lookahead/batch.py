"""A turn's random numbers turned into tensors: rows of pictures and prompts, timesteps, and what is dropped."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.errors import DatasetError
from ...models.lookahead import draw_timesteps, importance
from ..conditioning import Conditioning
from ..progress import Cancelled
from ..ranks import Ranks
from .config import LookaheadConfig
from .data import FaceData, FacePair
from .iterations import Turn
from .pictures import Cut, Encoded, PictureReader
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
    uniform: Uniform | None
    targets: Tensor
    """(batch, 3, side, side) in -1..1, on the CPU; the references likewise."""
    references: Tensor
    landmarks: list[Tensor | None]
    """Of the references' faces."""
    prompts: list[str]
    reference_prompts: list[str]


class _Row(NamedTuple):
    target: Encoded
    reference: Encoded
    noise: Tensor
    prompt: str
    reference_prompt: str
    latents: Tensor
    reference_latents: Tensor


class Batches:
    """Makes the batch of a turn. Every process draws for all of them and keeps its own rows.

    One thread reads the pictures of the turn to come, while the device works; it ends with ``close``.
    """

    def __init__(
        self,
        config: LookaheadConfig,
        data: FaceData,
        reader: PictureReader,
        told: Callable[[Sequence[str]], Conditioning],
        ranks: Ranks,
        device: torch.device,
    ):
        """Args: told: gives the conditioning of prompts, a row each, also of the empty one."""
        self._config, self._data, self._reader = config, data, reader
        self._told, self._ranks, self._device = told, ranks, device
        self._mine = slice(config.batch_size * ranks.index, config.batch_size * (ranks.index + 1))
        self._worker = ThreadPoolExecutor(1, "pictures")  # starts its thread when it is first asked
        self._closed = threading.Event()
        self._coming: tuple[Turn, Future[list[Callable[[], _Row]]]] | None = None

    def close(self) -> None:
        self._coming = None
        self._closed.set()  # a folder of which nothing can be read any more would keep the thread busy for long
        self._worker.shutdown(cancel_futures=True)

    def expect(self, turn: Turn) -> None:
        """Begin to read what ``make`` is to be asked for next. All draws are the turn's own: nothing else changes."""
        self._coming = turn, self._worker.submit(self._read, turn)

    def make(self, turn: Turn, timesteps: int) -> Batch:
        """Args: timesteps: of the noise schedule."""
        config, ranks = self._config, self._ranks
        own = turn.half_generator()
        (expected, reading), self._coming = self._coming or (None, None), None
        rows = [encoded() for encoded in (reading.result() if expected == turn else self._read(turn))]
        chances = importance(timesteps, config.timestep_alpha)
        if turn.ahead:
            chances = importance(config.lookahead_max_timestep, config.lookahead_alpha)
        drawn, dropped = torch.rand(2, len(turn.indices), generator=own, dtype=torch.float64)[:, self._mine]
        drops = torch.Generator().manual_seed(int(torch.randint(2**61, (), generator=own)) + ranks.index)
        return self._batch(
            rows,
            draw_timesteps(chances, drawn[: len(rows)]),
            None if turn.ahead else dropped < config.adapter_drop_chance,
            lambda block, tokens: torch.rand(tokens, generator=drops),
        )

    def fixed(self, indices: Sequence[int], timesteps: Tensor, seed: int) -> Batch:
        """Always the same batch of these pictures: nothing is dropped, and no target shows somebody else.

        Args:
            timesteps: (batch,).
        """
        rows = [self._read_row(index, seed + index, fixed=True)() for index in indices]
        return self._batch(rows, timesteps, None, None)

    def _batch(
        self, rows: Sequence["_Row"], timesteps: Tensor, dropped: Tensor | None, uniform: Uniform | None
    ) -> Batch:
        return Batch(
            Rows(
                self._stack([row.latents for row in rows]),
                self._stack([row.noise for row in rows]),
                self._stack([row.reference_latents for row in rows]),
                self._told([row.prompt for row in rows]),
                self._told([row.reference_prompt for row in rows]),
                self._stack([row.reference.features for row in rows]),
                self._reader.nobody.to(self._device),
            ),
            timesteps,
            dropped,
            uniform,
            torch.stack([row.target.pixels for row in rows]),
            torch.stack([row.reference.pixels for row in rows]),
            [row.reference.landmarks for row in rows],
            [row.prompt for row in rows],
            [row.reference_prompt for row in rows],
        )

    def _read(self, turn: Turn) -> list[Callable[[], _Row]]:
        """This process's rows of a turn; each is read, and encoded when it is called."""
        seeds = torch.randint(2**62, (len(turn.indices),), generator=turn.rows_generator()).tolist()
        rows = list(zip(turn.indices, seeds))[self._mine]
        return [self._read_row(*row) for row in rows[: self._config.lookahead_batch_size if turn.ahead else None]]

    def _read_row(self, index: int, seed: int, *, fixed: bool = False) -> Callable[[], _Row]:
        """The picture's own row or, where a picture of it cannot be read, that of the next one."""
        generator = torch.Generator().manual_seed(seed)
        data, chance = self._data, 0.0 if fixed else self._config.text_drop_chance
        unreadable: dict[Path, str] = {}
        for place in range(index, index + 2 * len(data)):
            if self._closed.is_set():
                raise Cancelled
            pair = data.pair(place % len(data), generator, strays=not fixed)
            wordless = bool(torch.rand((), generator=generator) < chance)
            try:
                first, second = (self._reader.cut(one, generator, unreadable) for one in (pair.target, pair.reference))
                return partial(self._row, pair, wordless, first, second, generator, unreadable)
            except DatasetError:
                continue
        self._reader.leave_out(unreadable)
        *_, last = unreadable.values()
        raise DatasetError(f"no picture with a reference could be read; the last one: {last}")

    def _row(
        self,
        pair: FacePair,
        wordless: bool,
        first: Cut,
        second: Cut,
        generator: torch.Generator,
        unreadable: Mapping[Path, str],
    ) -> _Row:
        self._reader.leave_out(unreadable)
        target = self._reader.target(pair.target, first)
        reference = self._reader.reference(pair, second, generator)
        latents, reference_latents = target.latents(generator), reference.latents(generator)
        noise = torch.randn(latents.shape, generator=generator)
        prompts = ("", "") if wordless else (pair.prompt, pair.reference_prompt)
        return _Row(target, reference, noise, *prompts, latents, reference_latents)

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(parts).to(self._device)
