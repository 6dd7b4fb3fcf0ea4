"""The displacement, and the guidance matrix, whose lowest eigenvectors span the subspace that LoRA starts in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_hf.theory.kronecker import FactorizedInput
from lora_da_hf.theory.subspace import TOLERANCE, Eigenpairs, leading_eigenpairs


@dataclass(frozen=True, kw_only=True)
class Displacement:
    """Where a layer's weights want to go, as a damped natural gradient step, kept as its factors.

    ``D = - diag(inverse_output) weight_grad Z^-1``, which is K-FAC's with a diagonal output factor.
    D itself takes a solve for each of its d_out rows; its products with the few vectors of a subspace do not need it.

    Attributes:
        scaled_gradient: ``[d_out, d_in]``, ``diag(inverse_output) weight_grad``.
        factorized_input: The Cholesky factor of Z.
    """

    scaled_gradient: Tensor
    factorized_input: FactorizedInput

    def apply(self, vectors: Tensor) -> Tensor:
        """Return ``D V`` for ``V [d_in, k]``."""
        return -(self.scaled_gradient @ self.factorized_input.solve(vectors))

    def transposed_times_apply(self, solved: Tensor) -> Tensor:
        """Return ``D^T D V``, ``[d_in, k]``, given ``Z^-1 V``."""
        # few rows on the left of a matrix are up to ten times as fast as few columns on the right of a transposed one
        rows = (solved.mT.contiguous() @ self.scaled_gradient.mT) @ self.scaled_gradient
        return self.factorized_input.solve(rows.mT)

    def norm(self, start: Tensor | None = None, tolerance: float = TOLERANCE) -> float:
        """Return the largest singular value of D; ``start [d_in, k]`` may be close to its vector."""
        pairs = leading_eigenpairs(
            lambda v: self.transposed_times_apply(self.factorized_input.solve(v)),
            1,
            like=self.scaled_gradient,
            tolerance=10 * tolerance,  # an eigenvalue is accurate to the square of the residual
            start=start,
        )
        return pairs.eigenvalues[0].clamp_min(0).sqrt().item()


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """``G = - D^T D + variance_coefficient * Z^-1``, kept as its parts."""

    displacement: Displacement
    variance_coefficient: float

    def apply(self, vectors: Tensor) -> Tensor:
        """Return ``G V`` for ``V [d_in, k]`` without forming G."""
        solved = self.displacement.factorized_input.solve(vectors)
        product = self.displacement.transposed_times_apply(solved).neg_()
        if self.variance_coefficient:
            product += solved * self.variance_coefficient
        return product


def build_guidance(
    displacement: Displacement,
    inverse_output: Tensor,
    *,
    population_size: int,
    variance_weight: float,
    normalize_terms: bool = False,
) -> Guidance:
    """Weigh bias against variance (arXiv 2510.24561, the guidance matrix).

    ``G = - D^T D + variance_weight c Z^-1`` with ``c = sum(inverse_output) / population_size``. Dividing D by a number,
    as ``layer_steps`` does, divides G by its square and leaves its eigenvectors alone. ``normalize_terms`` brings
    ``Z^-1`` to the Frobenius norm of ``D^T D``, so that c drops out. ``inverse_output [d_out]`` is that of the damped
    output factor.
    """
    variance = variance_weight * inverse_output.sum().item() / population_size
    if variance_weight and normalize_terms:
        unit = torch.eye(displacement.scaled_gradient.shape[1]).to(displacement.scaled_gradient)
        dense = displacement.apply(unit)
        narrow = dense if dense.shape[0] >= dense.shape[1] else dense.mT
        inverse_norm = displacement.factorized_input.solve(unit).norm().item()
        variance = variance_weight * (narrow.mT @ narrow).norm().item() / inverse_norm
    return Guidance(displacement=displacement, variance_coefficient=variance)


def lowest_subspace(guidance: Guidance, rank: int, tolerance: float = TOLERANCE) -> Eigenpairs:
    """Find the eigenvectors of the ``rank`` smallest eigenvalues of the guidance matrix, in ascending order.

    The basis for a smaller rank is the first columns of the basis for a larger one.
    """
    like = guidance.displacement.scaled_gradient
    pairs = leading_eigenpairs(lambda v: -guidance.apply(v), rank, like=like, tolerance=tolerance)
    return replace(pairs, eigenvalues=-pairs.eigenvalues)
