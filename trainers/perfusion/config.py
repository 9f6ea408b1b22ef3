"""Settings of Perfusion training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...models.perfusion import BETA, EMA_DECAY, TAU, OutputMode
from ..config import TrainConfig
from ..settings import OutputSettings, RunSettings
from .prompts import read_templates

NO_COVARIANCE = (
    "Perfusion needs the covariance of the base model's text encodings; make one with the node Estimate Text "
    "Covariance or with the command perfusion-covariance, or choose the authors' C_inv.npy"
)


@dataclass(frozen=True, kw_only=True)
class PerfusionConfig(TrainConfig):
    """One Perfusion concept. Defaults follow the authors' implementation (configs/perfusion_custom.yaml)."""

    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 4
    """Pictures per forward pass and process."""
    gradient_accumulation: int = 4
    """Forward passes per optimizer step; their gradients are averaged."""
    learning_rate: float = 0.03
    """Peak rate of the target outputs: what the value projections answer to the word."""
    embedding_learning_rate: float = 0.006
    """Rate of the word's embedding."""
    weight_decay: float = 0.01
    """Decoupled weight decay of both."""
    max_grad_norm: float = 0.0
    """The gradients' common norm is clipped to this; 0 turns clipping off, as the authors train."""
    beta: float = BETA
    """Bias of the gate: from which resemblance to the word on the answers change. Sampling uses a lower one."""
    tau: float = TAU
    """Temperature of the gate; less is a harder limit."""
    ema_decay: float = EMA_DECAY
    """How much of the target input each micro-batch keeps, while it follows the word's encoding."""
    prompts: Literal["templates", "captions"] = "templates"
    """Whether pictures are shown with a template drawn anew each time, or with their own captions."""
    templates: str = ""
    """Templates, one per line, with {} for the word; empty takes the authors' nine."""
    output_mode: OutputMode = "paper"
    """One target output per layer, as in the paper, or one for each of the 77 positions, as in the authors' code."""
    masked_loss: bool = True
    """Count the loss on the subject alone, where pictures have masks."""
    resolution: int = 0
    """Side of the square training pictures in pixels, a multiple of 8; 0 takes 512, or 1024 for SDXL."""
    flip: bool = True
    """Also train on mirrored pictures, with their masks; wrong for lettering and asymmetric subjects."""
    save_precision: Literal["fp16", "fp32"] = "fp16"
    """Type of the saved target outputs and embedding; fp16 keeps the file below 100 KB for SD1.5 and SD2.1."""
    checkpoint_every: int = 100
    """Write the whole training state every so many steps, to resume from; 0 writes it only at a cancel or failure."""
    preview_guidance: float = 6.0
    """Classifier-free guidance scale of a preview; it shows local key locking on the left, global on the right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.embedding_learning_rate > 0, "embedding_learning_rate", "positive")
        self._require(self.tau > 0, "tau", "positive")
        self._require(0 <= self.ema_decay < 1, "ema_decay", "from 0 up to, not including, 1")
        read_templates(self.templates)


@dataclass(frozen=True, kw_only=True)
class ConceptOutput(OutputSettings):
    """Where the concept goes: below ``perfusion_concepts``."""

    kind = "perfusion_concepts"


@dataclass(frozen=True, kw_only=True)
class PerfusionRun(RunSettings):
    """A whole Perfusion training from the command line."""

    output: ConceptOutput
    train: PerfusionConfig = field(default_factory=PerfusionConfig)
    covariance: Path | None = None
    """Covariance of the base's text encodings, of ours or the authors' C_inv.npy."""
