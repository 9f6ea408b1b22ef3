"""Several training processes seen as one: averages over all of them, and one writer."""

import torch
from torch import Tensor


class Ranks:
    """A single process; DistributedRanks has the same methods for many."""

    index = 0
    count = 1
    device: torch.device | None = None
    """This process's own device; None leaves the choice to the settings."""

    @property
    def is_writer(self) -> bool:
        """Only one process writes files and reports."""
        return self.index == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over all processes, without gradient."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all of them leave the loop at the same step."""
        return flag


class DistributedRanks(Ranks):
    """The processes that ``accelerate launch`` started."""

    def __init__(self, state) -> None:
        """Args: state: an ``accelerate.PartialState``."""
        self._state = state
        self.index = state.process_index
        self.count = state.num_processes
        self.device = state.device

    def mean(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import reduce

        return reduce(tensor.detach().clone(), reduction="mean")

    def any(self, flag: bool) -> bool:
        return bool(self.mean(torch.tensor(float(flag), device=self._state.device)) > 0)
