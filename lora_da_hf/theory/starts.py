"""Where an adapter starts: each start's directions in one layer, all from the same statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import NonFiniteError
from lora_da_hf.records import LayerStatistics, is_finite
from lora_da_hf.theory.guidance import Displacement, build_guidance, lowest_subspace
from lora_da_hf.theory.kronecker import FactorizedInput, in_float64
from lora_da_hf.theory.subspace import Apply, Eigenpairs, leading_eigenpairs

INPUTS_HAVE_NO_STEP = "the start is that of the inputs: A spans them, B is zero, and a step_size means nothing"


@dataclass(frozen=True)
class Directions:
    """What a start takes from one layer: its leading directions, best first.

    Attributes:
        pairs: The eigenpairs that they come from, in ascending order.
        rows: ``[rank, d_in]``, of norm 1; for ``whitened_gradient`` they are not orthogonal to each other.
        columns: ``[d_out, rank]``, how far the layer goes along each.
        norm: Largest singular value of the step that the start takes a part of; 1 if it takes none.
    """

    pairs: Eigenpairs
    rows: Tensor
    columns: Tensor
    norm: float


def _leading(apply: Apply, rank: int, *, like: Tensor, tolerance: float) -> tuple[Eigenpairs, Tensor, Tensor]:
    """Return the leading eigenpairs with their values negated, the eigenvectors, and these as rows."""
    pairs = leading_eigenpairs(apply, rank, like=like, tolerance=tolerance)
    return replace(pairs, eigenvalues=-pairs.eigenvalues), pairs.vectors, pairs.vectors.mT.contiguous()


def natural_gradient_start(
    displacement: Displacement,
    inverse_output: Tensor,
    config: LoRADAConfig,
    *,
    rank: int,
    population_size: int,
    tolerance: float,
) -> Directions:
    """LoRA-DA (arXiv 2510.24561): the subspace with the least bias and variance, and the displacement in it."""
    guidance = build_guidance(
        displacement,
        inverse_output,
        population_size=population_size,
        variance_weight=config.variance_weight,
        normalize_terms=config.normalize_guidance_terms,
    )
    pairs = lowest_subspace(guidance, rank, tolerance)
    vectors, norm = pairs.vectors, displacement.norm(pairs.vectors, tolerance)
    return Directions(pairs, vectors.mT.contiguous(), displacement.apply(vectors), norm)


def whitened_gradient_start(
    displacement: Displacement,
    weight_grad: Tensor,
    factorized_input: FactorizedInput,
    *,
    rank: int,
    tolerance: float,
) -> Directions:
    """The part of the displacement that the leading singular vectors of the whitened gradient carry.

    With ``Z = L L^T`` and Y the damped factors, these are those of ``Y^-1/2 G L^-T``, mapped back by ``Y^-1/2`` and
    ``L^-1``: the best approximation of the displacement of this rank where lengths are measured by Y and Z.
    """
    grad, scaled, lower = weight_grad.double(), displacement.scaled_gradient, factorized_input.cholesky

    def apply(vectors: Tensor) -> Tensor:
        mapped = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        rows = (mapped.mT.contiguous() @ scaled.mT) @ grad
        return torch.linalg.solve_triangular(lower, rows.mT, upper=False)

    pairs, vectors, _ = _leading(apply, rank, like=scaled, tolerance=tolerance)
    mapped = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    lengths = mapped.norm(dim=0)
    rows, columns = (mapped / lengths).mT.contiguous(), -(scaled @ mapped) * lengths
    return Directions(pairs, rows, columns, displacement.norm(torch.linalg.qr(mapped).Q, tolerance))


def gradient_start(weight_grad: Tensor, *, rank: int, tolerance: float) -> Directions:
    """The leading singular vectors of the gradient, as LoRA-GA and LoRA-One take them: a step of steepest descent."""
    grad = weight_grad.double()

    def apply(vectors: Tensor) -> Tensor:
        return ((vectors.mT.contiguous() @ grad.mT) @ grad).mT

    pairs, vectors, rows = _leading(apply, rank, like=grad, tolerance=tolerance)
    return Directions(pairs, rows, -(grad @ vectors), pairs.eigenvalues[0].abs().sqrt().item())


def inputs_start(statistics: LayerStatistics, *, rank: int, layer: str, tolerance: float) -> Directions:
    """The leading principal components of the inputs, as EVA (arXiv 2410.07170) takes them; columns are zero."""
    moment, mean = in_float64(statistics.input_second_moment), statistics.input_mean
    if mean is None or not (is_finite(moment) and is_finite(mean)):
        raise NonFiniteError(f"The inputs of {layer} are not finite, or their mean is not known. Check model and data.")
    mean = mean.double()

    def apply(vectors: Tensor) -> Tensor:
        rows = vectors.mT.contiguous()
        return (rows @ moment - (rows @ mean)[:, None] * mean).mT

    pairs, _, rows = _leading(apply, rank, like=moment, tolerance=tolerance)
    return Directions(pairs, rows, moment.new_zeros(statistics.weight_grad.shape[0], rank), 1.0)
