"""A word for a person, read from the middle of the encoder's pass: an embedding for each text encoder."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import FormatError

PREFIX = "word."
"""Of its tensors in a slim file."""


class WordHead(nn.Module):
    """Three linear layers on the mean over all places (OrLichter/lcm-lookahead, EmbeddingPredictor).

    Args:
        features: channels of the middle block.
        width: of the text encoders' embeddings, one after the other.
    """

    def __init__(self, features: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, features), nn.Linear(features, features), nn.Linear(features, width)
        )

    @classmethod
    def draw(cls, features: int, width: int, generator: torch.Generator) -> "WordHead":
        """An untrained one, from torch's own distribution of linear layers but for the generator (CPU)."""
        head = cls(features, width)
        with torch.no_grad():
            for parameter in head.parameters():
                bound = features**-0.5
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
        return head

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> "WordHead":
        """The head that a file holds, in its dtype and frozen.

        Args:
            tensors: with the prefix.
            name: file name, for messages.

        Raises:
            FormatError: the tensors are not those of such a head, or not finite.
        """
        own = {key.removeprefix(PREFIX): tensor.detach().clone() for key, tensor in tensors.items()}
        try:
            width, features = own["layers.2.weight"].shape
            with torch.device("meta"):
                head = cls(features, width)
            head.load_state_dict(own, assign=True)
        except (KeyError, ValueError, RuntimeError) as error:
            raise FormatError(
                f"{name}: the head that predicts a word is incomplete; download the file again"
            ) from error
        if not all(tensor.isfinite().all() for tensor in own.values()):
            raise FormatError(
                f"{name}: the head that predicts a word has values that are no numbers; choose another file"
            )
        return head.requires_grad_(False)

    def forward(self, features: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """(batch, channels, height, width) -> an embedding (batch, width) for each of these widths."""
        pooled = features.to(self.layers[0].weight.dtype).mean((2, 3))
        return self.layers(pooled).split(list(widths), dim=1)
