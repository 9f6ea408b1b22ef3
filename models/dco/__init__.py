"""Direct Consistency Optimization (arXiv 2402.12004): its training loss and its reward guidance."""

from .guidance import reward_guidance
from .loss import dco_loss

__all__ = ["dco_loss", "reward_guidance"]
