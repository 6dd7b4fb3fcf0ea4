"""The guidance matrix, whose lowest eigenvectors span the subspace that LoRA starts in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_hf.theory.displacement import Displacement
from lora_da_hf.theory.kronecker import FactorizedInput
from lora_da_hf.theory.subspace import Eigenpairs, complete_basis, leading_eigenpairs


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """``G = - bias_coefficient * D^T D + variance_coefficient * Z^-1``, kept as its parts.

    Attributes:
        displacement: D, with the Cholesky factor of Z.
        bias_coefficient: Weight of the bias term.
        variance_coefficient: Weight of the variance term, with everything multiplied in.
    """

    displacement: Displacement
    bias_coefficient: float
    variance_coefficient: float

    @property
    def factorized_input(self) -> FactorizedInput:
        """The Cholesky factor of Z."""
        return self.displacement.factorized_input

    @property
    def width(self) -> int:
        """The number of inputs, d_in."""
        return self.displacement.scaled_gradient.shape[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """Return ``G V`` for ``V [d_in, k]`` without forming G."""
        solved = self.factorized_input.solve(vectors)
        product = self.displacement.transposed_times_apply(solved) * -self.bias_coefficient
        if self.variance_coefficient:
            product += solved * self.variance_coefficient
        return product

    def dense(self) -> Tensor:
        """Return G, ``[d_in, d_in]``."""
        displacement = self.displacement.dense()
        matrix = displacement.mT @ displacement * -self.bias_coefficient
        if self.variance_coefficient:
            matrix += self.factorized_input.inverse() * self.variance_coefficient
        return matrix

    def objective(self, basis: Tensor) -> float:
        """Return ``trace(Q^T G Q)`` for an orthonormal ``Q [d_in, r]``: lower is better."""
        return (basis * self.apply(basis)).sum().item()


def build_guidance(
    displacement: Displacement,
    inverse_output: Tensor,
    *,
    population_size: int,
    bias_weight: float,
    variance_weight: float,
    normalize_terms: bool = False,
) -> Guidance:
    """Weigh bias against variance (arXiv 2510.24561, the guidance matrix).

    ``G = - bias_weight D^T D + variance_weight c Z^-1`` with ``c = sum(inverse_output) / population_size``. Dividing D
    by a number, as ``layer_steps`` does, divides G by its square and leaves its eigenvectors alone.

    Args:
        displacement: D.
        inverse_output: ``[d_out]``, inverse of the damped output factor.
        population_size: N, the number of samples that training draws from.
        bias_weight: Weight of the bias term.
        variance_weight: Weight of the variance term.
        normalize_terms: Bring ``Z^-1`` to the Frobenius norm of ``D^T D`` first; c then drops out.

    Returns:
        G in the dtype of ``displacement``.
    """
    variance = variance_weight * inverse_output.sum().item() / population_size
    if variance_weight and normalize_terms:
        dense = displacement.dense()
        narrow = dense if dense.shape[0] >= dense.shape[1] else dense.mT
        ratio = (narrow.mT @ narrow).norm() / displacement.factorized_input.inverse().norm()
        variance = variance_weight * ratio.item()
    return Guidance(displacement=displacement, bias_coefficient=bias_weight, variance_coefficient=variance)


def lowest_subspace(guidance: Guidance, rank: int, *, solver: str = "auto") -> Eigenpairs:
    """Find the eigenvectors of the ``rank`` smallest eigenvalues of the guidance matrix, in ascending order.

    The basis for a smaller rank is the first columns of the basis for a larger one. Without a variance term the
    directions beyond the rank of the displacement are completed as `complete_basis` defines.

    Args:
        guidance: G.
        rank: r, at most d_in.
        solver: ``"auto"``, ``"eigh"`` or ``"krylov"``.

    Returns:
        Eigenvalues ``[r]`` ascending and vectors ``[d_in, r]``.
    """
    dimension = guidance.width
    if solver == "eigh" or (solver == "auto" and rank == dimension):
        dense = guidance.dense()
        pairs = leading_eigenpairs(lambda v: -(dense @ v), dimension, rank, like=dense, solver="eigh")
    else:
        pairs = leading_eigenpairs(
            lambda v: -guidance.apply(v),
            dimension,
            rank,
            like=guidance.displacement.scaled_gradient,
            solver=solver,
        )
    if not guidance.variance_coefficient:
        pairs = complete_basis(pairs)
    return Eigenpairs(
        eigenvalues=-pairs.eigenvalues,
        vectors=pairs.vectors,
        residual=pairs.residual,
        solver=pairs.solver,
        converged=pairs.converged,
    )


def check_residual_in_float64(guidance: Guidance, pairs: Eigenpairs) -> float:
    """Measure in float64 the residual of a subspace that was solved in a narrower dtype.

    Args:
        guidance: G, in the narrower dtype.
        pairs: What the narrower solve found.

    Returns:
        The largest residual relative to the largest eigenvalue, with Rayleigh quotients as eigenvalues.
    """
    narrow = guidance.displacement
    wide = replace(
        guidance,
        displacement=Displacement(
            scaled_gradient=narrow.scaled_gradient.double(),
            factorized_input=replace(narrow.factorized_input, cholesky=narrow.factorized_input.cholesky.double()),
        ),
    )
    vectors = torch.linalg.qr(pairs.vectors.double()).Q
    image = wide.apply(vectors)
    projected = vectors.mT @ image
    error = image - vectors @ projected
    scale = torch.linalg.eigvalsh((projected + projected.mT) * 0.5).abs().max()
    return (error.norm(dim=0).max() / scale).item()
