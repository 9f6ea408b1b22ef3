"""The socket types of our own, for things that the host has no type for."""

from comfy_api.latest import io

Name = io.Custom("COMBO,STRING")
"""The name of what was saved, which list widgets and text widgets take alike: str."""
Base = io.Custom("PERSONALIZE_BASE")
"""A checkpoint opened for training: trainers.base.TrainingBase."""
Dataset = io.Custom("PERSONALIZE_DATASET")
"""Training pictures with captions: trainers.dataset.Dataset."""
Stopping = io.Custom("PERSONALIZE_STOPPING")
"""A rule that decides when training ends: trainers.stopping."""
Pictures = io.Custom("PERSONALIZE_PICTURES")
"""Pictures on their way to a dataset, unchecked while the tokens are unknown: tuple of trainers.dataset.Example."""
PreviewLosses = io.Custom("PERSONALIZE_PREVIEW_LOSS")
"""What previews of a picture should come closer to: tuple of nodes.preview_gradient.HostLoss."""
Encoder = io.Custom("PERSONALIZE_ENCODER")
"""A face encoder, as its file holds it: models.lookahead.encoder.LookaheadEncoder."""
Identity = io.Custom("PERSONALIZE_IDENTITY")
"""One or more people, ready for a guider: models.lookahead.identity.Identity."""
Concepts = io.Custom("PERSONALIZE_CONCEPT")
"""Perfusion concepts with their gates: tuple of nodes.rank_one_edits.GatedConcept."""
