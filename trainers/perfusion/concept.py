"""A concept while it is trained: the target input that follows the word, and the target outputs that are trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.families import Family
from ...models.learned_embeddings import LearnedEmbedding
from ...models.perfusion import (
    VALUE,
    Concept,
    ConceptParts,
    Covariance,
    EditSpace,
    Target,
    concept_encoding,
    moved_target_input,
    superclass_input,
)
from ...models.tokens import LearnedToken
from ..optimizer import ParameterGroup
from ..rank_one_edits import RankOneEdits, cross_projections, project
from ..ranks import Ranks
from .config import PerfusionConfig


class TrainedConcept:
    """One concept's edits of a diffusers UNet, started from its superclass.

    Its state is the target input, which moves in every micro-batch; a parameter too, though without gradient, so that
    the best weights of a run keep the target input they were used with.
    """

    def __init__(
        self,
        config: PerfusionConfig,
        unet: nn.Module,
        covariance: Covariance,
        encodings: Tensor,
        rows: Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        """Attach to the UNet.

        Args:
            encodings: of the first batch's prompts with the superclass word, (batch, tokens, dim).
            rows: of the superclass word in them, (batch,).
            ranks: over which the start and every move of the target input are averaged.
        """
        self._config, self._covariance, self._ranks = config, covariance, ranks or Ranks()
        device = next(unet.parameters()).device
        mean = self._ranks.mean
        self._superclass = mean(superclass_input(encodings, rows, config.output_mode).to(device))
        start = mean(concept_encoding(encodings, rows).to(device))
        self.target_input = nn.Parameter(start, requires_grad=False)
        self._values: dict[str, nn.Parameter] = {}
        outputs: dict[str, list[Tensor]] = {}
        for name, module in cross_projections(unet).items():
            answer = project(module, self._superclass)
            if name.endswith(VALUE):
                self._values[name] = answer = nn.Parameter(answer)
            outputs[name] = [answer]
        self.edits = RankOneEdits(unet, self._space(), outputs)

    @property
    def groups(self) -> list[ParameterGroup]:
        """The target outputs of value projections, and the target input, which no optimizer moves."""
        config = self._config
        return [
            ParameterGroup("target_output", self._values, config.learning_rate, config.weight_decay),
            ParameterGroup("target_input", {"target_input": self.target_input}, config.learning_rate, 0.0),
        ]

    @torch.no_grad()
    def follow(self, encodings: Tensor, rows: Tensor, decay: float | None = None) -> None:
        """Move the target input towards the word's encoding; once per micro-batch, before the UNet runs.

        Args:
            encodings: of the micro-batch's prompts with the word, (batch, tokens, dim).
            rows: of the word in them, (batch,).
            decay: by default the settings'; 0 goes all the way.
        """
        moved = moved_target_input(
            self.target_input, encodings, rows, self._config.ema_decay if decay is None else decay
        )
        self._place(self._ranks.mean(moved))

    def state_dict(self) -> dict[str, Any]:
        """The target input."""
        return {"target_input": self.target_input.detach().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._place(state["target_input"])

    def finished(self, token: LearnedToken, rows: dict[str, Tensor], family: Family, path: Path) -> Concept:
        """The concept as trained so far.

        Args:
            rows: of the word by encoder key, (rows, dim).
            path: of the file that it will be kept in.
        """
        target_input = self.target_input.detach().float().cpu()
        parts = ConceptParts(
            target_input,
            self._covariance.dual(target_input),
            {name: value.detach() for name, value in self._values.items()},
            self._superclass,
        )
        embedding = LearnedEmbedding(token.trigger, {key: value.detach() for key, value in rows.items()})
        return Concept(embedding, token.initializer, parts, self._covariance.fingerprint, family.name, path.name, {})

    def _place(self, target_input: Tensor) -> None:
        self.target_input.copy_(target_input)
        self.edits.space = self._space()

    def _space(self) -> EditSpace:
        vector = self.target_input.detach().clone()
        return EditSpace([Target(vector, self._covariance.dual(vector), self._config.beta, self._config.tau)])
