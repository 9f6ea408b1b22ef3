"""The two kinds of optimizer steps in turn, and the random numbers of each."""

from dataclasses import dataclass
from typing import Any

import torch

from ..order import BatchOrder
from ..ranks import Ranks
from .config import LookaheadConfig
from .data import FaceData


@dataclass(frozen=True)
class Turn:
    """What the next forward pass is to do."""

    ahead: bool
    """Whether it looks ahead, with the rows of the denoising pass before."""
    indices: tuple[int, ...]
    """Pictures of the batches of all processes."""
    seed: int
    """Of all further draws."""
    strength: float
    """Of the LCM LoRA."""

    def rows_generator(self) -> torch.Generator:
        """For what both halves share: pairs, cuts, latents and noise."""
        return torch.Generator().manual_seed(self.seed)

    def half_generator(self) -> torch.Generator:
        """For what each half draws anew: timesteps and what is dropped."""
        return torch.Generator().manual_seed((self.seed + 1 + self.ahead) % 2**62)


class Iterations:
    """Endless turns: an iteration is a denoising step, and every so often a step that looks ahead on the same batch.

    With gradient accumulation each step has several turns, all of the same kind, so that the halves' gradients never
    mix.
    """

    def __init__(self, config: LookaheadConfig, data: FaceData, generator: torch.Generator, ranks: Ranks):
        self._config, self._generator = config, generator
        self._count = config.batch_size * ranks.count
        self._chances = data.chances() if data.settings.balance else None
        self._order = BatchOrder(len(data))
        self._turns, self._strength = 0, 1.0
        self._batches: list[list[int]] = []
        """Seed and pictures of each micro-batch of the denoising step last begun."""

    def next(self) -> Turn:
        config = self._config
        step, part = divmod(self._turns, config.gradient_accumulation)
        per_round = config.lookahead_every + 1 if config.lookahead_every else 1
        whole, place = divmod(step, per_round)
        ahead = bool(config.lookahead_every) and place == 1
        if not ahead:
            self._batches = [*self._batches[:part], self._draw()]
        elif part == 0 and config.lcm_scale_every and whole * config.lookahead_every % config.lcm_scale_every == 0:
            self._strength = self._draw_strength()
        self._turns += 1
        seed, *indices = self._batches[part]
        return Turn(ahead, tuple(indices), seed, self._strength)

    def peek(self) -> Turn:
        """The next turn, which stays the next."""
        state, drawn = self.state_dict(), self._generator.get_state()
        turn = self.next()
        self.load_state_dict(state)
        self._generator.set_state(drawn)
        return turn

    def _draw(self) -> list[int]:
        if self._chances is None:
            indices = [draw.example for draw in self._order.next_batch(self._count, self._generator)]
        else:
            indices = torch.multinomial(
                self._chances, self._count, replacement=True, generator=self._generator
            ).tolist()
        return [int(torch.randint(2**62, (), generator=self._generator)), *indices]

    def _draw_strength(self) -> float:
        full, between = torch.rand(2, generator=self._generator, dtype=torch.float64).tolist()
        if full < self._config.lcm_full_chance:
            return 1.0
        return self._config.lcm_min_scale + (1 - self._config.lcm_min_scale) * between

    def state_dict(self) -> dict[str, Any]:
        """Position and what is under way, fit for JSON; the generator's state is kept by its owner."""
        return {
            "turns": self._turns,
            "strength": self._strength,
            "batches": [list(batch) for batch in self._batches],
            "order": self._order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; DatasetError when it belongs to another number of pictures."""
        self._order.load_state_dict(state["order"])
        self._turns, self._strength = state["turns"], state["strength"]
        self._batches = [list(batch) for batch in state["batches"]]
