"""Where an adapter starts: one layer, from its statistics to each start's directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.config import STARTS, Damping, LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics, is_finite
from lora_da_hf.theory.guidance import Displacement, Guidance, build_guidance, lowest_subspace
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, in_float64, inverse_output_factor
from lora_da_hf.theory.subspace import TOLERANCE, Apply, Eigenpairs, leading_eigenpairs

LOOSE = 1e-5
"""Tolerance of what is stored in 8 bits."""
INPUTS_HAVE_NO_STEP = "the start is that of the inputs: A spans them, B is zero, and a step_size means nothing"


Directions = tuple[Eigenpairs, Tensor, Tensor, float]
"""What a start takes from one layer: its leading directions, best first.

The eigenpairs that they come from, in ascending order; the rows ``[rank, d_in]``, of norm 1, which are not orthogonal
to each other for ``whitened_gradient``; the columns ``[d_out, rank]``, how far the layer goes along each; and the
largest singular value of the step that the start takes a part of, or 1 if it takes none.
"""


def _leading(apply: Apply, rank: int, *, like: Tensor, tolerance: float) -> tuple[Eigenpairs, Tensor, Tensor]:
    """Return the leading eigenpairs with their values negated, the eigenvectors, and these as rows."""
    pairs = leading_eigenpairs(apply, rank, like=like, tolerance=tolerance)
    return replace(pairs, eigenvalues=-pairs.eigenvalues), pairs.vectors, pairs.vectors.mT.contiguous()


def natural_gradient_start(guidance: Guidance, *, rank: int, tolerance: float) -> Directions:
    """LoRA-DA (arXiv 2510.24561): the subspace with the least bias and variance, and the displacement in it."""
    pairs, displacement = lowest_subspace(guidance, rank, tolerance), guidance.displacement
    vectors, norm = pairs.vectors, displacement.norm(pairs.vectors, tolerance)
    return pairs, vectors.mT.contiguous(), displacement.apply(vectors), norm


def whitened_gradient_start(
    displacement: Displacement, weight_grad: Tensor, *, rank: int, tolerance: float
) -> Directions:
    """The part of the displacement that the leading singular vectors of the whitened gradient carry.

    With ``Z = L L^T`` and Y the damped factors, these are those of ``Y^-1/2 G L^-T``, mapped back by ``Y^-1/2`` and
    ``L^-1``: the best approximation of the displacement of this rank where lengths are measured by Y and Z.
    """
    grad, scaled, lower = weight_grad.double(), displacement.scaled_gradient, displacement.factorized_input.cholesky

    def apply(vectors: Tensor) -> Tensor:
        mapped = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        rows = (mapped.mT.contiguous() @ scaled.mT) @ grad
        return torch.linalg.solve_triangular(lower, rows.mT, upper=False)

    pairs, vectors, _ = _leading(apply, rank, like=scaled, tolerance=tolerance)
    mapped = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    lengths = mapped.norm(dim=0)
    rows, columns = (mapped / lengths).mT.contiguous(), -(scaled @ mapped) * lengths
    return pairs, rows, columns, displacement.norm(torch.linalg.qr(mapped).Q, tolerance)


def gradient_start(weight_grad: Tensor, *, rank: int, tolerance: float) -> Directions:
    """The leading singular vectors of the gradient, as LoRA-GA and LoRA-One take them: a step of steepest descent."""
    grad = weight_grad.double()

    def apply(vectors: Tensor) -> Tensor:
        return ((vectors.mT.contiguous() @ grad.mT) @ grad).mT

    pairs, vectors, rows = _leading(apply, rank, like=grad, tolerance=tolerance)
    return pairs, rows, -(grad @ vectors), pairs.eigenvalues[0].abs().sqrt().item()


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
    return pairs, rows, moment.new_zeros(statistics.weight_grad.shape[0], rank), 1.0


def factorize(statistics: LayerStatistics, config: LoRADAConfig, *, layer: str) -> FactorizedInput | None:
    """Factorise the damped input second moment of a layer; None for a start that does without."""
    if config.start in ("gradient", "inputs"):
        return None
    return factorize_input(statistics.input_second_moment, Damping.parse(config.input_damping), layer=layer)


def solve_layer(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput | None,
    config: LoRADAConfig,
    *,
    layer: str,
    rank: int,
    population_size: int,
    tolerance: float = TOLERANCE,
) -> LayerSolution:
    """Find the leading directions of ``config.start`` for one layer, up to ``rank``, in float64.

    ``factorized_input`` is what `factorize` returned for it, or for a layer that shares its input. ``tolerance`` is
    that of the residuals, relative to the largest eigenvalue.

    Raises:
        NonFiniteError: if a statistic is not finite.
        SolveError: if the eigenproblem cannot be solved.
    """
    gradient, squares, added = statistics.weight_grad, statistics.output_grad_second_moment_diag, 0.0
    if not (is_finite(gradient) and is_finite(squares)):
        raise NonFiniteError(f"The gradients of {layer} are not finite. Check the loss on the samples used.")
    options: dict[str, Any] = {"rank": rank, "tolerance": tolerance}
    try:
        if config.start == "inputs":
            pairs, rows, columns, norm = inputs_start(statistics, layer=layer, **options)
        elif config.start == "gradient" or factorized_input is None:
            pairs, rows, columns, norm = gradient_start(gradient, **options)
        else:
            inverse, added = inverse_output_factor(squares.double(), Damping.parse(config.output_damping), layer=layer)
            displacement = Displacement(scaled_gradient=inverse[:, None] * gradient, factorized_input=factorized_input)
            if config.start == "whitened_gradient":
                pairs, rows, columns, norm = whitened_gradient_start(displacement, gradient, **options)
            else:
                guidance = build_guidance(
                    displacement,
                    inverse,
                    population_size=population_size,
                    variance_weight=config.variance_weight,
                    normalize_terms=config.normalize_guidance_terms,
                )
                pairs, rows, columns, norm = natural_gradient_start(guidance, **options)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolveError(
            f"The eigenproblem of {layer} cannot be solved: {error} Raise input_damping and output_damping."
        ) from error
    if not is_finite(rows):
        raise NonFiniteError(f"The eigenvectors of {layer} are not finite. Raise input_damping.")
    divisor = norm if config.lengths == "equal" else 1.0
    return LayerSolution(
        basis_A=rows,
        basis_B=columns / divisor,
        eigenvalues=pairs.eigenvalues / divisor**2,
        displacement_norm=norm,
        input_damping=0.0 if factorized_input is None else factorized_input.damping,
        output_damping=added,
        solver=pairs.solver,
        residual=pairs.residual,
        notes=() if factorized_input is None else factorized_input.notes,
    )


def solve_other_starts(
    statistics: Mapping[str, LayerStatistics], config: LoRADAConfig, *, ranks: Mapping[str, int], population_size: int
) -> dict[str, dict[str, LayerSolution]]:
    """Solve layers that share an input for each start but the config's, as closely as 8 bits can tell.

    For the start of the inputs, the first of the layers has to do.
    """
    found: dict[str, dict[str, LayerSolution]] = {name: {} for name in statistics}
    largest = max(ranks[name] for name in statistics)
    for start in (start for start in STARTS if start != config.start):
        other, factorized = replace(config, start=start), None
        for name, layer in list(statistics.items())[: 1 if start == "inputs" else None]:
            factorized = factorized or factorize(layer, other, layer=name)
            rank = largest if start == "inputs" else ranks[name]
            options: dict[str, Any] = {"rank": rank, "population_size": population_size, "tolerance": LOOSE}
            found[name][start] = solve_layer(layer, factorized, other, layer=name, **options)
    return found
