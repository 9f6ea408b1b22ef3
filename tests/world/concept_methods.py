"""Perfusion and Textual Inversion on the small world, trained as users train them, and pictures with several concepts.

As in `methods`, nothing here knows how a method works: trainings are calls of the trainers, with settings that suit so
small a model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from captions import random_caption
from generator import random_scene
from methods import CPU, SETTINGS, Job, Painter
from torch import Tensor

from comfyui_personalize.models.learned_embeddings import LearnedEmbedding, read_learned_embeddings
from comfyui_personalize.models.perfusion import Concept, concept_row, edit_space, read_concept, read_covariance
from comfyui_personalize.models.tokens import LearnedToken, replace_triggers
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.dvar import textual_inversion as inversion
from comfyui_personalize.trainers.dvar.config import TextualInversionConfig
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.perfusion.config import PerfusionConfig
from comfyui_personalize.trainers.perfusion.covariance import estimate
from comfyui_personalize.trainers.perfusion.covariance_config import CovarianceConfig
from comfyui_personalize.trainers.perfusion.train import train
from comfyui_personalize.trainers.personalization import Personalization, PersonalizationSettings
from comfyui_personalize.trainers.rank_one_edits import RankOneEdits, cross_projections, project

CAPTIONS = 1500
"""Captions of random scenes, for the covariance."""
SHARED = {name: SETTINGS[name] for name in ("batch_size", "resolution", "crop", "precision")} | {"weight_decay": 0.0}
PERFUSION = SHARED | {
    "steps": 300,
    "gradient_accumulation": 1,
    "learning_rate": 0.03,
    "embedding_learning_rate": 0.05,
    "ema_decay": 0.9,
    "prompts": "captions",
    "flip": False,
    "checkpoint_every": 0,
}
"""Chosen on the tuning prompts. The authors' are 400 steps of 4 x 4 pictures, 0.03, 0.006, 0.99 and nine templates."""
INVERSION = SHARED | {
    "steps": 300,
    "learning_rate": 1e-2,
    "scale_learning_rate": False,
    "prompts": "captions",
    "flip": False,
    "checkpoint_every": 0,
}
BETA, TAU = 0.65, 0.15
"""The gate while drawing: the authors'."""


def make_covariance(checkpoint: Path, folder: Path, captions: int = CAPTIONS) -> Path:
    """The covariance of a base model's text encodings, estimated once."""
    place = OutputPlace(checkpoint.stem, folder, folder, folder / "runs" / checkpoint.stem)
    if not place.lora_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, text = random.Random(0), folder / "captions.txt"
        text.write_text("\n".join(random_caption(rng, random_scene(rng)) for _ in range(captions)), "utf-8")
        estimate(CovarianceConfig(captions=0), open_base(checkpoint), text, place, device=CPU)
    return place.lora_path


def perfusion(job: Job, covariance: Path, **settings: object) -> Concept:
    """A concept of the job's subject; read back where it was trained before."""
    place = _place(job, "perfusion")
    if not place.lora_path.exists():
        config = PerfusionConfig(**PERFUSION | {"steps": job.steps, "seed": job.seed} | settings)
        given = open_base(job.checkpoint), Dataset.from_folder(job.lesson), read_covariance(covariance)
        train(config, *given, place, device=CPU)
    return read_concept(place.lora_path)


def textual_inversion(job: Job) -> Personalization:
    """The subject's word alone; read back where it was trained before."""
    place, dataset = _place(job, "textual_inversion"), Dataset.from_folder(job.lesson)
    path = place.embedding_path(dataset.tokens[0], dataset.tokens)
    if not path.exists():
        config = TextualInversionConfig(**INVERSION | {"steps": job.steps, "seed": job.seed})
        inversion.train(config, open_base(job.checkpoint), dataset, place, device=CPU)
    (embedding,) = read_learned_embeddings(path)
    return _word(embedding, dataset.tokens[0].initializer)


def _place(job: Job, method: str) -> OutputPlace:
    name = f"{method}_{job.lesson.name}_{job.seed}"
    return OutputPlace(name, job.output / "concepts", job.output / "embeddings", job.output / "runs" / name)


class ConceptPainter(Painter):
    """Draws with Perfusion concepts, each behind its gate."""

    def __init__(
        self,
        checkpoint: Path,
        concepts: Sequence[Concept],
        *,
        beta: float = BETA,
        tau: float = TAU,
        gated_removal: bool = False,
    ) -> None:
        super().__init__(checkpoint, [_word(concept.embedding, concept.superclass) for concept in concepts])
        self._words = {concept.trigger: concept.superclass for concept in concepts}
        self.space = edit_space(concepts, *([setting] * len(concepts) for setting in (beta, tau, gated_removal)))
        outputs = {
            name: [concept.target_output(name, lambda rows, own=module: project(own, rows)) for concept in concepts]
            for name, module in cross_projections(self._unet).items()
        }
        self._edits = RankOneEdits(self._unet, self.space, outputs)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, locked: bool = False, **guidance) -> Tensor:
        """As Painter.draw; ``locked`` shows keys the superclass words (global key locking)."""
        if locked:
            plain = self._conditioning([replace_triggers(prompt, self._words) for prompt in prompts])
            self._edits.superclass = torch.cat([self._conditioning([""] * len(prompts)).embeds, plain.embeds])
        try:
            return super().draw(prompts, seeds, **guidance)
        finally:
            self._edits.superclass = None

    def row_of(self, prompt: str, trigger: str) -> int:
        """The row of a prompt's encoding that is a concept's."""
        encoder = self._prompts
        slot, words = encoder.family.encoders[0], [token.trigger for token in encoder.tokens]  # of one row each
        return concept_row(encoder.token_ids(prompt, slot), len(encoder.table(slot.key)) + words.index(trigger))

    def encodings(self, prompts: Sequence[str]) -> Tensor:
        """What cross-attention reads of prompts, (n, tokens, dim)."""
        return self._conditioning(prompts).embeds


def _word(embedding: LearnedEmbedding, initializer: str) -> Personalization:
    """A word without a LoRA."""
    token = LearnedToken(embedding.trigger, initializer, len(next(iter(embedding.rows.values()))))
    name = embedding.trigger
    return Personalization(name, {}, (token,), (embedding,), PersonalizationSettings(path=Path(name)))
