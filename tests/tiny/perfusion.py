"""Perfusion files for the tiny models: a covariance, and concepts that their words really call up."""

from pathlib import Path

import torch
from torch import Tensor

from comfyui_personalize.models.perfusion import Covariance, write_concept, write_covariance
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.perfusion.concept import TrainedConcept
from comfyui_personalize.trainers.perfusion.config import PerfusionConfig
from comfyui_personalize.trainers.perfusion.prompts import Prompt
from comfyui_personalize.trainers.perfusion.text import ConceptText

WIDTHS = {"sd15": 64, "sd21": 128, "sdxl": 192}
"""Of each family's text encodings."""


def covariance_of(width: int, seed: int = 0) -> Covariance:
    """C⁻¹ of random encodings."""
    rows = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Covariance(torch.linalg.inv(rows.T @ rows / len(rows)))


def write_random_covariance(path: Path, family: str) -> Path:
    """The covariance above as a file of ours."""
    return write_covariance(path, covariance_of(WIDTHS[family]), {"personalize.family": family}, overwrite=True)


def write_random_concept(
    path: Path, checkpoint: Path, token: LearnedToken, *, seed: int = 0, gain: float = 3.0
) -> Path:
    """A concept whose target outputs are the superclass's with noise."""
    base, generator = open_base(checkpoint), torch.Generator().manual_seed(seed)
    text = ConceptText(base.family, base.load_text_encoders(), base.tokenizer(), token)
    prompt = Prompt(f"a {token.trigger}", f"a {token.initializer}")
    rows = {key: noise_like(leaf, generator) * leaf.std() for key, leaf in text.learned.items()}
    with torch.no_grad():
        for key, leaf in text.learned.items():
            leaf.copy_(rows[key])
    encodings = text.encode_frozen([prompt.superclass]).embeds
    covariance = covariance_of(encodings.shape[-1])
    config = PerfusionConfig(ema_decay=0.0)
    concept = TrainedConcept(config, base.load_unet(), covariance, encodings, text.superclass_rows([prompt]))
    concept.follow(text.encode_frozen([prompt.text]).embeds, text.rows([prompt]))
    with torch.no_grad():
        for value in concept.groups[0].parameters.values():
            value += gain * noise_like(value, generator)
    return write_concept(path, concept.finished(token, rows, base.family, path), overwrite=True)


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator)
