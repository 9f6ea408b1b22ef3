"""What a Perfusion training refuses before anything is loaded."""

from ...models.errors import ConfigError, IncompatibleModelError
from ...models.perfusion import Covariance
from ...models.tokens import LearnedToken
from ..base import TrainingBase
from ..dataset import Dataset


def the_only_token(dataset: Dataset) -> LearnedToken:
    """The concept's word; ConfigError when there is not exactly one, without a superclass, or with class pictures."""
    if len(dataset.tokens) != 1:
        raise ConfigError(
            f"Perfusion teaches one word per training, the dataset has {len(dataset.tokens)}; give one token, and "
            "train further concepts on their own"
        )
    token = dataset.tokens[0]
    if not token.initializer.strip():
        raise ConfigError(
            f"token {token.trigger} has no initializer; Perfusion starts from the superclass word, such as teddy"
        )
    if dataset.class_examples:
        raise ConfigError("Perfusion has no use for class pictures; leave them out")
    return token


def check_covariance(covariance: Covariance, base: TrainingBase) -> None:
    """Raise IncompatibleModelError unless the covariance is of the base's text encodings."""
    covariance.check_family(base.family.name)
    width = base.unet.config["cross_attention_dim"]
    if covariance.width != width:
        raise IncompatibleModelError(
            f"the covariance is of text encodings of width {covariance.width}, those of {base.label} are {width} wide; "
            f"estimate one for {base.family.label}"
        )
