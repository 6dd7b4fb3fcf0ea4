"""The displacement: where the layer's weights want to go, as a damped natural gradient step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_hf.theory.kronecker import FactorizedInput
from lora_da_hf.theory.subspace import fix_signs, leading_eigenpairs

_NORM_TOLERANCE = 1e-6
_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of float32, which statistics are summed in: a gradient of rank 3 has further singular values of that size."""


@dataclass(frozen=True, kw_only=True)
class Displacement:
    """``D = - diag(inverse_output) weight_grad Z^-1`` (K-FAC with a diagonal output factor), kept as its factors.

    D itself takes a solve for each of its d_out rows; its products with the few vectors of a subspace do not need it.

    Attributes:
        scaled_gradient: ``[d_out, d_in]``, ``diag(inverse_output) weight_grad``.
        factorized_input: The Cholesky factor of Z.
    """

    scaled_gradient: Tensor
    factorized_input: FactorizedInput

    def dense(self) -> Tensor:
        """Return D, ``[d_out, d_in]``."""
        return self.factorized_input.solve(self.scaled_gradient.mT).mT.neg()

    def apply(self, vectors: Tensor) -> Tensor:
        """Return ``D V`` for ``V [d_in, k]``."""
        return -(self.scaled_gradient @ self.factorized_input.solve(vectors))

    def transposed_times_apply(self, solved: Tensor) -> Tensor:
        """Return ``D^T D V``, ``[d_in, k]``, given ``Z^-1 V``."""
        # few rows on the left of a matrix are up to ten times as fast as few columns on the right of a transposed one
        rows = (solved.mT.contiguous() @ self.scaled_gradient.mT) @ self.scaled_gradient
        return self.factorized_input.solve(rows.mT)

    def singular_pairs(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Find the singular vectors of D in the span of ``basis [d_in, k]``, without those that are only rounding.

        A singular value of D is known to rounding of D's norm; the eigenvalue of ``D^T D``, which is its square, to the
        square root of that, so it says nothing about the rank in float32.

        Returns:
            Singular values ``[m]`` in descending order, and right singular vectors ``[d_in, m]``, m at most k.
        """
        _, values, turn = torch.linalg.svd(self.apply(basis), full_matrices=False)
        vectors = basis @ turn.mT
        factors = self.scaled_gradient.norm(dtype=torch.float64) * self.factorized_input.solve(vectors).norm(dim=0)
        found = values > _ROUNDING * torch.maximum(factors, values[0])
        return values[found], fix_signs(vectors[:, found])

    def norm(self, start: Tensor | None = None) -> float:
        """Return the largest singular value of D; ``start [d_in, k]`` may be close to its vector."""
        # an eigenvalue is accurate to the square of the residual
        pairs = leading_eigenpairs(
            lambda v: self.transposed_times_apply(self.factorized_input.solve(v)),
            1,
            like=self.scaled_gradient,
            tolerance=_NORM_TOLERANCE,
            start=start,
        )
        return pairs.eigenvalues[0].clamp_min(0).sqrt().item()
