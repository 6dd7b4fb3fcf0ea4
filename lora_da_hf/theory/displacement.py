"""The displacement: where the layer's weights want to go, as a damped natural gradient step."""

from __future__ import annotations

from torch import Tensor

from lora_da_hf.theory.kronecker import FactorizedInput
from lora_da_hf.theory.subspace import leading_eigenpairs

_NORM_TOLERANCE = 1e-6


def displacement(weight_grad: Tensor, inverse_output: Tensor, factorized_input: FactorizedInput) -> Tensor:
    """Compute ``D = - diag(inverse_output) weight_grad Z^-1`` (K-FAC with a diagonal output factor).

    Args:
        weight_grad: ``[d_out, d_in]``, mean over samples of the gradient of each sample's mean label loss.
        inverse_output: ``[d_out]``, the inverse of the damped output factor.
        factorized_input: The Cholesky factor of Z.

    Returns:
        ``[d_out, d_in]``.
    """
    return factorized_input.solve((inverse_output[:, None] * weight_grad).mT).mT.neg()


def gram_product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return ``matrix^T matrix vectors`` for ``matrix [m, n]`` and ``vectors [n, k]``."""
    # a few columns on the right of a transposed matrix take MKL ten times as long as a few rows on its left
    rows = (vectors.mT.contiguous() @ matrix.mT) @ matrix
    return rows.mT


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value of ``matrix [m, n]``.

    It is the square root of the largest eigenvalue of the smaller Gram matrix, which is not formed for large ones.
    """
    narrow = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    scale = narrow.abs().max().item()
    if scale == 0:
        return 0.0
    narrow = narrow / scale
    # an eigenvalue is accurate to the square of the residual
    pairs = leading_eigenpairs(
        lambda v: gram_product(narrow, v), narrow.shape[1], 1, like=narrow, tolerance=_NORM_TOLERANCE
    )
    value = pairs.eigenvalues[0]
    return scale * value.clamp_min(0).sqrt().item()
