"""DVAR (arXiv 2302.04841): stop a personalization when its objective on one fixed batch no longer changes."""

from .evaluation import EvaluationBatch, EvaluationBatches, EvaluationSettings, GeneratorDraws, intervals
from .stopping import PRESETS, PlateauStop, Preset, VarianceStop

__all__ = [
    "PRESETS",
    "EvaluationBatch",
    "EvaluationBatches",
    "EvaluationSettings",
    "GeneratorDraws",
    "PlateauStop",
    "Preset",
    "VarianceStop",
    "intervals",
]
