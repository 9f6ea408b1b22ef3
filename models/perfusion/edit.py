"""The gated rank-one edit of a key or value projection, for one concept or several at once.

W stays as it is. What an edit adds to Wx depends on the layer only through W u and the target outputs, so a runtime
measures an encoding once for all layers, and computes W u once per layer and run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

BETA = 0.75
"""Bias of the gate in the authors' training; they sample with 0.6 to 0.7."""
TAU = 0.1
"""Temperature of the gate in the authors' training; they sample with 0.15."""
_DEPENDENT = 1e-6


@dataclass(frozen=True)
class Target:
    """Where a concept lies among the text encodings, and the gate that it opens."""

    vector: Tensor
    """The target input i*, (dim,)."""
    dual: Tensor
    """C⁻¹ i* for the covariance C of encodings, (dim,); all that an edit needs of C."""
    beta: float = BETA
    """Similarity at which the gate is half open: 0 for an encoding unlike i*, 1 for i* itself; inf keeps it closed."""
    tau: float = TAU
    """Softness of the gate."""
    gated_removal: bool = False
    """Whether encodings lose the concept's direction only as far as the gate opens. The paper and the authors take it
    from every encoding, so that words which are like the concept's lose it, too, and a closed gate is no switch."""


@dataclass(frozen=True)
class Scores:
    """What an encoding has of each concept."""

    gates: Tensor
    """(batch, tokens, concepts), between 0 and 1, float32."""
    components: Tensor
    """Coefficients along the basis, (batch, tokens, rank), float32."""

    def scaled(self, strength: float | Tensor) -> "Scores":
        """The same for an edit of another strength: one number, or one per row, (batch,)."""
        if isinstance(strength, Tensor):
            strength = strength.to(self.gates).reshape(-1, 1, 1)
        return Scores(self.gates * strength, self.components * strength)


class EditSpace:
    """The span of the target inputs, with a basis that is orthonormal in the inner product of C⁻¹.

    Encodings lose what they have in that span and get, gate by gate, the target outputs for it; so several concepts
    are more than the sum of their single edits as soon as their target inputs are alike. Which basis is taken is of
    no consequence: it makes uᵢᵀ C⁻¹ uⱼ = δᵢⱼ, and the projection Σ u uᵀ C⁻¹ on the span is unique.
    """

    def __init__(self, targets: Sequence[Target]):
        """Compute everything that depends on neither the prompt nor the layer, on the targets' device.

        Raises:
            ConfigError: no target, targets of different widths, a covariance that is not positive definite along a
                target, or a temperature that is not positive.
        """
        _check(targets)
        device = targets[0].vector.device
        # float64, which not every device knows; these are a few vectors.
        vectors, duals = (
            torch.stack([part.detach().cpu().double() for part in parts])
            for parts in ([target.vector for target in targets], [target.dual for target in targets])
        )
        gram = vectors @ duals.T  # (concepts, concepts)
        energies = gram.diagonal()
        if not ((energies > 0) & energies.isfinite()).all():
            raise ConfigError(
                f"the energies of the target inputs are {energies.tolist()}, expected positive numbers; the concept or "
                "its covariance is damaged, train it again"
            )
        scale = energies.rsqrt().unsqueeze(1)
        cosines = (gram + gram.T) / 2 * scale * scale.T
        # Concepts may share a target input; their span then has fewer dimensions than there are concepts.
        lengths, axes = torch.linalg.eigh(cosines)
        kept = lengths > _DEPENDENT
        mix = (axes[:, kept] / lengths[kept].sqrt()).T * scale.T  # (rank, concepts)

        def finished(values: Tensor) -> Tensor:
            return values.to(torch.float32).to(device)

        self.basis = finished(mix @ vectors)
        """u, (rank, dim), float32."""
        self._duals = finished(mix @ duals)  # C⁻¹ u
        self._gates = finished(duals / energies.unsqueeze(1))
        self._betas = finished(torch.tensor([target.beta for target in targets]))
        self._taus = finished(torch.tensor([target.tau for target in targets]))
        self._removal = None
        if any(target.gated_removal for target in targets):
            self._removal = _GatedRemoval(targets, cosines, energies.sqrt(), scale * vectors @ (mix @ duals).T)

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def projection(self) -> Tensor:
        """The projection on the span, (dim, dim): Σ u uᵀ C⁻¹."""
        return self.basis.T @ self._duals

    def measure(self, encodings: Tensor) -> Scores:
        """Gates and components of encodings (batch, tokens, dim), with gradient to the encodings.

        σ((xᵀ C⁻¹ i* / i*ᵀ C⁻¹ i* - β) / τ) for each concept, and xᵀ C⁻¹ u for each u; with ``gated_removal`` of any
        concept what the gates leave of the latter, without gradient.
        """
        if encodings.shape[-1] != self.width:
            raise ConfigError(
                f"the concept was trained on text encodings of width {self.width}, these have {encodings.shape[-1]}; "
                "use the model family it was trained on"
            )
        encodings = encodings.float()
        similarities = _products(encodings, self._gates)
        gates = torch.sigmoid((similarities - self._betas.to(similarities.device)) / self._taus.to(similarities.device))
        if self._removal is not None:
            return Scores(gates, self._removal.components(similarities, gates))
        return Scores(gates, _products(encodings, self._duals))


class _GatedRemoval:
    """What encodings lose when some concepts take their direction only as far as their gates open.

    With e = i*/√E, y = eᵀ C⁻¹ x, G = eᵀ C⁻¹ e and a weight w for each concept, which is its gate or, for the paper's
    removal, 1: Σ_c √w_c e_c (√W G √W + 1 - W)⁻¹ √W y. That is w y e for one concept; a concept of weight 0 is as if it
    were not there, and with weights of 1 this is the projection on the span.
    """

    def __init__(self, targets: Sequence[Target], cosines: Tensor, lengths: Tensor, within: Tensor):
        """Args: all float64, on the CPU.
        cosines: G, (concepts, concepts).
        lengths: √E, (concepts,).
        within: rows of e along the basis, (concepts, rank).
        """
        self._cosines, self._lengths, self._within = cosines, lengths, within
        self._gated = torch.tensor([target.gated_removal for target in targets])

    @torch.no_grad()
    def components(self, similarities: Tensor, gates: Tensor) -> Tensor:
        """Along the basis, (batch, tokens, rank), float32; similarities and gates are (batch, tokens, concepts)."""
        along, opened = (values.cpu().double() for values in (similarities, gates))
        weights = torch.where(self._gated, opened, 1.0)
        root = weights.sqrt()
        mixed = root.unsqueeze(-1) * self._cosines * root.unsqueeze(-2) + torch.diag_embed(1 - weights)
        taken = torch.linalg.pinv(mixed, rtol=_DEPENDENT, hermitian=True) @ (root * along * self._lengths).unsqueeze(-1)
        return ((root * taken.squeeze(-1)) @ self._within).to(gates)


def _check(targets: Sequence[Target]) -> None:
    if not targets:
        raise ConfigError("an edit needs at least one concept")
    shapes = {tuple(part.shape) for target in targets for part in (target.vector, target.dual)}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ConfigError(f"target inputs have the shapes {sorted(shapes)}; combine concepts of one model family")
    for target in targets:
        if not target.tau > 0 or target.beta != target.beta:
            raise ConfigError(
                f"a gate has beta {target.beta} and tau {target.tau}; expected a number and a positive number"
            )


def _products(encodings: Tensor, vectors: Tensor) -> Tensor:
    """Inner products with each of a few vectors, (batch, tokens, vectors).

    Not as a matrix product: autocast and TF32 would round it, and gates amplify rounding by 1/τ.
    """
    return torch.stack([(encodings * vector).sum(dim=-1) for vector in vectors.to(encodings.device)], dim=-1)


def edit_projection(projected: Tensor, scores: Scores, basis: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """The projection of edited encodings (arXiv 2305.01644, gated rank-one editing).

    h = W (x - Σⱼ uⱼ xᵀC⁻¹uⱼ) + Σ_c gate_c · o*_c, which for one concept is
    W (x - i* sim/E) + σ((sim/E - β)/τ) o* with sim = xᵀ C⁻¹ i* and E = i*ᵀ C⁻¹ i*.

    Args:
        projected: W x, (batch, tokens, out).
        scores: of x, from EditSpace.measure.
        basis: W u, (rank, out).
        outputs: target output of each concept, (1, out) for all token positions, or (positions, out) with one for
            each; longer prompts begin anew after the last.

    Returns:
        The shape and dtype of ``projected``, from float32 inside.
    """
    edited = projected.float()
    for index, output in enumerate(outputs):
        edited = torch.addcmul(edited, scores.gates[..., index, None], at_positions(output.float(), edited.shape[1]))
    for index, row in enumerate(basis.float()):
        edited = torch.addcmul(edited, scores.components[..., index, None], row, value=-1)
    return edited.to(projected.dtype)


def edited_input(encodings: Tensor, scores: Scores, space: EditSpace) -> Tensor:
    """x - Σⱼ uⱼ xᵀC⁻¹uⱼ: what a projection of edited encodings is given, whatever else changes the projection.

    With `gated_outputs` added behind it this is `edit_projection`, without W u.

    Args:
        encodings: x, (batch, tokens, dim), in any dtype.
        scores: of x, from EditSpace.measure.
    """
    edited = encodings.float()
    for index, row in enumerate(space.basis.to(edited.device)):
        edited = torch.addcmul(edited, scores.components[..., index, None], row, value=-1)
    return edited.to(encodings.dtype)


def gated_outputs(scores: Scores, outputs: Sequence[Tensor]) -> Tensor:
    """Σ_c gate_c · o*_c, (batch, tokens, out), float32; arguments as of `edit_projection`."""
    tokens = scores.gates.shape[1]
    terms = [scores.gates[..., index, None] * at_positions(o.float(), tokens) for index, o in enumerate(outputs)]
    return torch.stack(terms).sum(dim=0)


def at_positions(outputs: Tensor, tokens: int) -> Tensor:
    """Rows (positions, out) for a prompt of ``tokens`` tokens: (tokens, out), or (1, out) when one serves all."""
    if len(outputs) in (1, tokens):
        return outputs
    return outputs[torch.arange(tokens, device=outputs.device) % len(outputs)]


def key_value_inputs(encodings: Tensor, superclass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the key and the value projections read under global key locking.

    Keys, which decide where attention goes, read the prompt with the superclass word; values keep the concept's. The
    paper replaces the keys' input in this way, and so do the authors (perfusion/roe_attention.py).

    Args:
        encodings, superclass: of the two prompts, (batch, tokens, dim); None leaves keys as they are.
    """
    if superclass is None:
        return encodings, encodings
    if superclass.shape != encodings.shape:
        raise ConfigError(
            f"the prompt with the superclass word has the encoding {tuple(superclass.shape)}, the concept's "
            f"{tuple(encodings.shape)}; both need the same length"
        )
    return superclass, encodings
