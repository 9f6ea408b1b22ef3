"""Settings of DCO training."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import Crop, TrainConfig
from ..settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class DCOConfig(TrainConfig):
    """DCO LoRA with learned tokens. Defaults follow the authors (kyungmnlee/dco, customize.py)."""

    crop: Crop = "random"
    """Which square of a picture is used. The authors cut a new random one in every step; here several are cached."""
    beta: float = 1000.0
    """Pull towards the base model; the authors use 1000 to 2000. 0 or -1 trains with the plain loss."""
    rank: int = 32
    """Rank of the LoRA; file size and memory grow with it. The authors use 64 for a style."""
    text_learning_rate: float = 5e-6
    """Rate of the learned tokens and of the text encoders' LoRA."""
    text_weight_decay: float = -1.0
    """Weight decay of the same; -1 takes ``weight_decay``."""
    train_text_encoder: bool = False
    """Also train a LoRA on the text encoders."""
    prior_loss_weight: float = 1.0
    """Weight of the class pictures' loss, when the dataset has class pictures."""
    token_norm: Literal["row", "authors"] = "row"
    """Norm that a token without initializer is kept at: its starting row's, or the table's standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.beta >= 0 or self.beta == -1, "beta", "positive, or 0 or -1 for the plain loss")
        self._require(1 <= self.rank <= 1024, "rank", "between 1 and 1024")
        self._require(self.text_learning_rate > 0, "text_learning_rate", "positive")
        self._require(
            self.text_weight_decay >= 0 or self.text_weight_decay == -1, "text_weight_decay", "0 or more, or -1"
        )
        self._require(self.prior_loss_weight >= 0, "prior_loss_weight", "0 or more")


@dataclass(frozen=True, kw_only=True)
class DCORun(RunSettings):
    """A whole DCO training from the command line."""

    train: DCOConfig = field(default_factory=DCOConfig)
