"""Direct Consistency Optimization (arXiv 2402.12004): its training loss and its reward guidance."""

from .guidance import reward_guidance
from .loss import dco_loss, denoising_error

__all__ = ["dco_loss", "denoising_error", "reward_guidance"]
