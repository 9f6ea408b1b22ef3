"""Several concepts in one set of weights: the constrained optimization of Custom Diffusion (arXiv 2212.04488)."""

import torch
from torch import Tensor

_DAMPING = 1e-8
"""Of the mean square of the captions' encodings: in directions that few captions have, the change is the smallest."""
_DEPENDENT = 1e-10
"""Words whose encodings differ by less than this share are taken for one."""


class ConstrainedMerge:
    """Weights that read some words as other weights do, and change least for what ordinary captions say.

    Ŵ = argmin ‖(W − W₀) Cᵀ‖ over the captions' encodings C, so that Ŵ cᵀ = v for every word's encoding c. With
    G = Cᵀ C and the words as rows of c, Ŵ = W₀ + (vᵀ − W₀ cᵀ)(c G⁻¹ cᵀ)⁻¹ c G⁻¹, the same for any multiple of G
    (adobe-research/custom-diffusion, composenW.py). Solved in float64, once for all weights.
    """

    def __init__(self, captions: Tensor, words: Tensor) -> None:
        """Args:
        captions: encodings of ordinary captions' tokens, (tokens, dim).
        words: encodings of the concepts' words, (words, dim). Of words that are encoded alike, which the authors
            leave out, the mean of what they ask for is met.
        """
        captions, self._words = captions.double(), words.double()
        gram = captions.T @ captions
        gram.diagonal().add_(_DAMPING * gram.diagonal().mean())
        dual = torch.linalg.solve(gram, self._words.T).T  # (words, dim)
        self._directions = torch.linalg.pinv(self._words @ dual.T, hermitian=True, rtol=_DEPENDENT) @ dual

    def weight(self, own: Tensor, values: Tensor) -> Tensor:
        """The merged weight, (out, dim), in the dtype of the base's own.

        Args:
            own: the base's weight, (out, dim).
            values: what each word is to become, (words, out).
        """
        base = own.to(self._words)
        missing = values.to(self._words) - self._words @ base.T
        return (base + missing.T @ self._directions).to(own)
