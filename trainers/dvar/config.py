"""Settings of the three trainings; defaults follow the authors (yandex-research/DVAR, README.md)."""

from dataclasses import dataclass, field
from typing import Literal

from ...models.custom_diffusion import Part
from ..config import TrainConfig
from ..prompts import PromptSource
from ..settings import OutputSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class MethodConfig(TrainConfig):
    """What the three have in common."""

    batch_size: int = 2
    """Pictures per forward pass and process."""
    scale_learning_rate: bool = True
    """Multiply the rate by batch size, accumulation and number of processes."""
    weight_decay: float = 1e-2
    """Decoupled weight decay; it also acts on the tokens."""
    optimizer: Literal["adamw", "adamw8bit", "sam", "adaptive_sam"] = "adamw"
    """``adamw8bit`` keeps the optimizer's state in 8 bits; it needs bitsandbytes and a GPU. ``sam`` and
    ``adaptive_sam`` seek weights whose neighbours are good too: twice the time per step, another rate, no decay."""
    sam_rho: float = 0.05
    """How far ``sam`` looks around; ``adaptive_sam`` wants about ten times as much."""
    sam_momentum: float = 0.9
    """Momentum of ``sam`` and ``adaptive_sam``."""
    max_grad_norm: float = 0.0
    """The gradients' common norm is clipped to this; 0 turns clipping off, as the authors train."""
    flip: bool = True
    """Also train on mirrored pictures; wrong for lettering and asymmetric subjects."""
    prompts: PromptSource = "object"
    """Where prompts come from: sentences around the token that name an object or a style, or the captions."""
    class_word: str = ""
    """What follows the token in those sentences, such as dog; empty leaves the token alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.sam_rho >= 0, "sam_rho", "0 or more")
        self._require(0 <= self.sam_momentum < 1, "sam_momentum", "from 0 up to, not including, 1")


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig(MethodConfig):
    """Learned tokens and nothing else (arXiv 2208.01618)."""

    steps: int = 6100
    """Optimizer steps."""
    learning_rate: float = 5e-3
    """Peak rate of the tokens, before it is scaled."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig(MethodConfig):
    """What the two have in common that may preserve a class."""

    prior_loss_weight: float = 1.0
    """Weight of the class pictures' loss, when there are class pictures."""
    class_pictures: int = 0
    """How many class pictures to use: of the dataset's or, where it has none, such as the base model draws for
    class_prompt before the training, kept beside the runs for the next one. 0 takes all of the dataset's."""
    class_prompt: str = ""
    """What the base model draws, such as a photo of a dog."""
    class_steps: int = 50
    """Sampling steps of such a picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.prior_loss_weight >= 0, "prior_loss_weight", "0 or more")
        self._require(0 <= self.class_pictures <= 100_000, "class_pictures", "between 0 and 100000")
        self._require(1 <= self.class_steps <= 1000, "class_steps", "between 1 and 1000")


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig(PriorConfig):
    """A LoRA on the UNet, and the dataset's tokens (arXiv 2208.12242)."""

    learning_rate: float = 5e-4
    """Peak rate of the LoRA and of the tokens, before it is scaled."""
    rank: int = 4
    """Rank of the LoRA; file size and memory grow with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1 <= self.rank <= 1024, "rank", "between 1 and 1024")


@dataclass(frozen=True, kw_only=True)
class DreamBoothRun(RunSettings):
    """A whole DreamBooth-LoRA training from the command line."""

    train: DreamBoothConfig = field(default_factory=DreamBoothConfig)


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionConfig(PriorConfig):
    """Keys and values of cross-attention, and the dataset's tokens (arXiv 2212.04488)."""

    steps: int = 500
    """Optimizer steps."""
    learning_rate: float = 1e-5
    """Peak rate of keys, values and tokens, before it is scaled; doubled where there are class pictures."""
    max_grad_norm: float = 1.0
    """The gradients' common norm is clipped to this; 0 turns clipping off."""
    rescale_variants: int = 12
    """Copies of each picture at random sizes, captioned far away or zoomed in; 0 makes none."""
    save_precision: Literal["fp16", "fp32"] = "fp16"
    """Type of the saved weights; learned tokens are always saved in fp32."""
    save_authors_file: bool = False
    """Also write the weights and tokens as delta.bin, which the authors' code reads."""
    trained: Part = "keys_values"
    """Which weights of cross-attention: keys and values, or ``cross_attention`` for queries and outputs too."""
    kept_share: float = 1.0
    """How much of the change is saved. 1 saves whole weights; less saves matrices of low rank, whose singular values
    make up this share of the change's: 0.6, the authors' number, makes files about five times smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.kept_share <= 1, "kept_share", "above 0 and at most 1")
        self._require(0 <= self.rescale_variants <= 1024, "rescale_variants", "between 0 and 1024")


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionOutput(OutputSettings):
    """Where a Custom Diffusion goes."""

    kind = "custom_diffusion"


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionRun(RunSettings):
    """A whole Custom Diffusion from the command line."""

    output: CustomDiffusionOutput
    train: CustomDiffusionConfig = field(default_factory=CustomDiffusionConfig)


@dataclass(frozen=True, kw_only=True)
class TextualInversionRun(RunSettings):
    """A whole Textual Inversion from the command line."""

    train: TextualInversionConfig = field(default_factory=TextualInversionConfig)
