"""The guidance matrix, whose lowest eigenvectors span the subspace that LoRA starts in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_hf.theory.displacement import gram_product
from lora_da_hf.theory.kronecker import FactorizedInput
from lora_da_hf.theory.subspace import Eigenpairs, complete_basis, leading_eigenpairs


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """``G = - bias_coefficient * D^T D + variance_coefficient * Z^-1``, kept as its parts.

    Attributes:
        displacement: ``[d_out, d_in]``, normalised or not.
        factorized_input: The Cholesky factor of Z.
        bias_coefficient: Weight of the bias term.
        variance_coefficient: Weight of the variance term, with everything multiplied in.
    """

    displacement: Tensor
    factorized_input: FactorizedInput
    bias_coefficient: float
    variance_coefficient: float

    def apply(self, vectors: Tensor) -> Tensor:
        """Return ``G V`` for ``V [d_in, k]`` without forming G."""
        product = gram_product(self.displacement, vectors) * -self.bias_coefficient
        if self.variance_coefficient:
            product += self.factorized_input.solve(vectors) * self.variance_coefficient
        return product

    def dense(self) -> Tensor:
        """Return G, ``[d_in, d_in]``."""
        matrix = self.displacement.mT @ self.displacement * -self.bias_coefficient
        if self.variance_coefficient:
            matrix += self.factorized_input.inverse() * self.variance_coefficient
        return matrix

    def objective(self, basis: Tensor) -> float:
        """Return ``trace(Q^T G Q)`` for an orthonormal ``Q [d_in, r]``: lower is better."""
        return (basis * self.apply(basis)).sum().item()


def build_guidance(
    displacement: Tensor,
    inverse_output: Tensor,
    factorized_input: FactorizedInput,
    *,
    displacement_norm: float,
    population_size: int,
    bias_weight: float,
    variance_weight: float,
    normalize_terms: bool = False,
) -> Guidance:
    """Weigh bias against variance (arXiv 2510.24561, the guidance matrix).

    ``G = - bias_weight D^^T D^ + variance_weight c Z^-1`` with ``D^ = D / displacement_norm`` and
    ``c = sum(inverse_output) / (population_size * displacement_norm**2)``.

    Args:
        displacement: D, ``[d_out, d_in]``.
        inverse_output: ``[d_out]``, inverse of the damped output factor.
        factorized_input: The Cholesky factor of Z.
        displacement_norm: What D is divided by: its largest singular value, or 1 to leave it.
        population_size: N, the number of samples that training draws from.
        bias_weight: Weight of the bias term.
        variance_weight: Weight of the variance term.
        normalize_terms: Bring ``Z^-1`` to the Frobenius norm of ``D^^T D^`` first; c then drops out.

    Returns:
        G in the dtype of ``displacement``.
    """
    displacement = displacement / displacement_norm
    variance = 0.0
    if variance_weight and normalize_terms:
        narrow = displacement if displacement.shape[0] >= displacement.shape[1] else displacement.mT
        ratio = (narrow.mT @ narrow).norm() / factorized_input.inverse().norm()
        variance = variance_weight * ratio.item()
    elif variance_weight:
        variance = variance_weight * inverse_output.sum().item() / (population_size * displacement_norm**2)
    return Guidance(
        displacement=displacement,
        factorized_input=factorized_input,
        bias_coefficient=bias_weight,
        variance_coefficient=variance,
    )


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
    dimension = guidance.displacement.shape[1]
    if solver == "eigh" or (solver == "auto" and rank == dimension):
        dense = guidance.dense()
        pairs = leading_eigenpairs(lambda v: -(dense @ v), dimension, rank, like=dense, solver="eigh")
    else:
        pairs = leading_eigenpairs(
            lambda v: -guidance.apply(v), dimension, rank, like=guidance.displacement, solver=solver
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
    narrow = guidance.factorized_input
    wide = replace(
        guidance,
        displacement=guidance.displacement.double(),
        factorized_input=replace(narrow, cholesky=narrow.cholesky.double()),
    )
    vectors = torch.linalg.qr(pairs.vectors.double()).Q
    image = wide.apply(vectors)
    projected = vectors.mT @ image
    error = image - vectors @ projected
    scale = torch.linalg.eigvalsh((projected + projected.mT) * 0.5).abs().max()
    return (error.norm(dim=0).max() / scale).item()
