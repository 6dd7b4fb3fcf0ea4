"""The guidance matrix, whose lowest eigenvectors span the subspace that LoRA starts in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_hf.theory.displacement import Displacement
from lora_da_hf.theory.subspace import Eigenpairs, complete_basis, leading_eigenpairs, relative_residual


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
        dense = displacement.dense()
        narrow = dense if dense.shape[0] >= dense.shape[1] else dense.mT
        inverse_norm = displacement.factorized_input.inverse().norm().item()
        variance = variance_weight * (narrow.mT @ narrow).norm().item() / inverse_norm
    return Guidance(displacement=displacement, variance_coefficient=variance)


def lowest_subspace(guidance: Guidance, rank: int) -> Eigenpairs:
    """Find the eigenvectors of the ``rank`` smallest eigenvalues of the guidance matrix, in ascending order.

    The basis for a smaller rank is the first columns of the basis for a larger one. Without a variance term the
    directions beyond the rank of the displacement, whose eigenvalue is 0, are completed as `complete_basis` defines.
    """
    pairs = leading_eigenpairs(lambda v: -guidance.apply(v), rank, like=guidance.displacement.scaled_gradient)
    pairs = replace(pairs, eigenvalues=-pairs.eigenvalues)
    if guidance.variance_coefficient:
        return pairs
    singular, found = guidance.displacement.singular_pairs(pairs.vectors)
    vectors = complete_basis(found, rank)
    eigenvalues = torch.zeros_like(pairs.eigenvalues)
    eigenvalues[: singular.shape[0]] = -singular.square()
    residual = relative_residual(guidance.apply(vectors), vectors, eigenvalues)
    return replace(pairs, eigenvalues=eigenvalues, vectors=vectors, residual=residual)
