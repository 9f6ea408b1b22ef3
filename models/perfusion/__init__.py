"""Perfusion (arXiv 2305.01644): one concept in a small file, by gated rank-one edits of cross-attention.

Where the text encoding resembles the concept's, each key projection answers as to the superclass word, and each value
projection answers what was trained. How much they resemble is measured in the inverse covariance of text encodings; a
gate with a bias and a temperature decides from which resemblance on the answer changes, and can be set when sampling.
"""

from .concept import Concept, concept_tensors, edit_space, read_concept, write_concept
from .concept_parts import KEY, VALUE, ConceptParts
from .covariance import Covariance, CovarianceEstimate, read_covariance, write_covariance
from .edit import (
    BETA,
    TAU,
    EditSpace,
    Scores,
    Target,
    at_positions,
    edit_projection,
    edited_input,
    gated_outputs,
    key_value_inputs,
)
from .loss import masked_loss, resize_mask, soft_mask
from .sampling import ddim, ddim_timesteps, edm_sigmas, euler_edm, nearest_timestep, training_sigmas
from .target import EMA_DECAY, OutputMode, concept_encoding, concept_row, moved_target_input, superclass_input

__all__ = [
    "BETA",
    "EMA_DECAY",
    "KEY",
    "TAU",
    "VALUE",
    "Concept",
    "ConceptParts",
    "Covariance",
    "CovarianceEstimate",
    "EditSpace",
    "OutputMode",
    "Scores",
    "Target",
    "at_positions",
    "concept_encoding",
    "concept_row",
    "concept_tensors",
    "ddim",
    "ddim_timesteps",
    "edit_projection",
    "edit_space",
    "edited_input",
    "edm_sigmas",
    "euler_edm",
    "gated_outputs",
    "key_value_inputs",
    "masked_loss",
    "moved_target_input",
    "nearest_timestep",
    "read_concept",
    "read_covariance",
    "resize_mask",
    "soft_mask",
    "superclass_input",
    "training_sigmas",
    "write_concept",
    "write_covariance",
]
