"""The order in which training meets its examples: shuffled passes that a checkpoint can resume exactly."""

from typing import Any, NamedTuple

import torch

from ..models.errors import DatasetError


class Draw(NamedTuple):
    """One place of a batch: an example and, for prior preservation, the class example beside it."""

    example: int
    class_example: int | None = None


class BatchOrder:
    """Endless shuffled passes over the examples and, independently, over the class examples.

    Every example is met once before any is met again. All ranks draw the whole world's batch with
    equal generators and keep their part of it, so the order does not depend on how many there are.

    Args:
        examples: number of examples, at least 1.
        class_examples: number of class examples; 0 trains without prior preservation.
    """

    def __init__(self, examples: int, class_examples: int = 0) -> None:
        if examples < 1:
            raise DatasetError("the dataset has no pictures; add at least one")
        self._examples = _Passes(examples)
        self._class_examples = _Passes(class_examples) if class_examples else None

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, with fractions."""
        return self._examples.epoch

    def next_batch(self, count: int, generator: torch.Generator) -> list[Draw]:
        """Draw ``count`` places; a batch may run over the end of a pass into the next one."""
        examples = [self._examples.next(generator) for _ in range(count)]
        if self._class_examples is None:
            return [Draw(example) for example in examples]
        return [Draw(example, self._class_examples.next(generator)) for example in examples]

    def state_dict(self) -> dict[str, Any]:
        """Position as plain numbers and lists, fit for JSON; the generator's state is kept by its owner."""
        classes = self._class_examples
        return {"examples": self._examples.state(), "class_examples": None if classes is None else classes.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            DatasetError: the state belongs to another number of pictures; nothing has changed then.
        """
        streams = {"examples": self._examples, "class_examples": self._class_examples}
        for name, stream in streams.items():
            found = 0 if state[name] is None else state[name]["count"]
            expected = 0 if stream is None else stream.count
            if found != expected:
                raise DatasetError(
                    f"the checkpoint was made with {found} {name.replace('_', ' ')}, the dataset has {expected}; "
                    "restore the dataset or start anew"
                )
        for name, stream in streams.items():
            if stream is not None:
                stream.load(state[name])


class _Passes:
    def __init__(self, count: int) -> None:
        self.count = count
        self.order: list[int] = []
        self.position = 0
        self.passes = 0

    @property
    def epoch(self) -> float:
        return max(self.passes - 1, 0) + self.position / self.count

    def next(self, generator: torch.Generator) -> int:
        if self.position == len(self.order):
            self.order = torch.randperm(self.count, generator=generator).tolist()
            self.position = 0
            self.passes += 1
        self.position += 1
        return self.order[self.position - 1]

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "order": list(self.order), "position": self.position, "passes": self.passes}

    def load(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])
        self.position = state["position"]
        self.passes = state["passes"]
