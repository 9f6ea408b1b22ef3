"""What a guider tells the identity's attention through the host: who does what in a UNet call, and a run's own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

KEY = "personalize_identity"
"""Key of our wrappers on a MODEL."""
ROLES, RUN = "personalize_identity_roles", "personalize_identity_run"
"""Entries of the host's transformer_options: {uuid of a conditioning: Role}, and the sampling run's `Run`."""


@dataclass(frozen=True)
class Role:
    """What the rows of one conditioning do in a UNet call."""

    keep: str | None = None
    """Name under which the keys and values of these rows are kept: an encoder pass."""
    tokens: str | None = None
    """Which identity tokens cross-attention sees, "cond" or "uncond"."""
    shared: str | None = None
    """Name of the kept keys and values that self-attention sees."""
    area: tuple[int, ...] | None = None
    """Height, width, top and left of the part of the latent that the conditioning is for; None is all of it."""


@dataclass
class Run:
    """What is made once for a sampling run, so that nothing of it outlives it on the device."""

    pictures: int = 1
    """Reference pictures of each row; in an encoder pass all rows' first pictures come before the second ones."""
    size: tuple[int, int] | None = None
    """Height and width of the whole latent."""
    latents: Tensor | None = None
    """The references, scaled for the UNet, (pictures * rows, channels, height, width)."""
    noise: Tensor | None = None
    """What they are noised with, same shape; None leaves them clean."""
    sigma: float | None = None
    """Noise level of the references."""
    references: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    """Name -> block -> keys and values, (rows, pictures * tokens, heads * dim)."""
    made: dict[tuple, Any] = field(default_factory=dict)
    """Tensors that are the same in every step."""

    def __deepcopy__(self, memo: dict) -> "Run":
        return self

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
