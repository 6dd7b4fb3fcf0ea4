"""One layer, from its statistics to its subspace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.theory.displacement import Displacement
from lora_da_hf.theory.guidance import Guidance, build_guidance, lowest_subspace
from lora_da_hf.theory.kronecker import FactorizedInput, damped_product, factorize_input, inverse_output_factor
from lora_da_hf.theory.subspace import Eigenpairs

_FLOAT64_UP_TO = 8192
_FLOAT32_RESIDUAL = 1e-4
_ROWS = 256
"""Of a gradient, that are widened to float64 at once."""


def solve_dtype(input_width: int) -> torch.dtype:
    """Return the dtype that a layer is solved in: float32, checked in float64, for inputs wider than 8192."""
    return torch.float64 if input_width <= _FLOAT64_UP_TO else torch.float32


def factorize(
    statistics: LayerStatistics, config: LoRADAConfig, *, layer: str, dtype: torch.dtype | None = None
) -> FactorizedInput:
    """Factorise the damped input second moment of a layer, in the dtype of its width unless another one is given."""
    return factorize_input(
        statistics.input_second_moment,
        Damping.parse(config.input_damping),
        layer=layer,
        dtype=dtype or solve_dtype(statistics.input_second_moment.shape[0]),
    )


def solve_group(
    statistics: Mapping[str, LayerStatistics],
    config: LoRADAConfig,
    *,
    ranks: Mapping[str, int],
    population_size: int,
) -> dict[str, LayerSolution]:
    """Solve layers that share an input, and so the factorisation of its second moment, as `solve_layer` does."""
    first = next(iter(statistics))
    factorized = factorize(statistics[first], config, layer=first)
    return {
        name: solve_layer(layer, factorized, config, layer=name, rank=ranks[name], population_size=population_size)
        for name, layer in statistics.items()
    }


def solve_layer(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput,
    config: LoRADAConfig,
    *,
    layer: str,
    rank: int,
    population_size: int,
) -> LayerSolution:
    """Find the subspace of ``rank`` that minimises bias plus variance for one layer.

    ``factorized_input`` is what `factorize` returned for it, or for a layer that shares its input, and the solution has
    its dtype and device. Where float32 is not accurate enough, the layer is solved again in float64 on the CPU.

    Raises:
        NonFiniteError: if a statistic is not finite.
        SolveError: if the eigenproblem cannot be solved.
    """
    if not all(part.isfinite().all() for part in (statistics.weight_grad, statistics.output_grad_second_moment_diag)):
        raise NonFiniteError(f"The gradients of {layer} are not finite. Check the loss on the samples used.")
    statistics = statistics.on(factorized_input.cholesky.device)
    guidance, output_damping = _pose(statistics, factorized_input, config, layer, population_size)
    narrow = factorized_input.cholesky.dtype != torch.float64
    try:
        pairs = lowest_subspace(guidance, rank)
        residual = _residual_in_float64(statistics, guidance, pairs) if narrow else pairs.residual
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        if not narrow:
            raise SolveError(
                f"The eigenproblem of {layer} cannot be solved in float64: {error} Raise input_damping and "
                "output_damping."
            ) from error
        pairs, residual = None, math.nan
    if pairs is None or (narrow and not residual <= _FLOAT32_RESIDUAL):
        why = f"left a residual of {residual:.1e}" if math.isfinite(residual) else "overflowed"
        on_cpu = statistics.on("cpu")
        again = factorize(on_cpu, config, layer=layer, dtype=torch.float64)
        solution = solve_layer(on_cpu, again, config, layer=layer, rank=rank, population_size=population_size)
        notes = (*factorized_input.notes, f"float32 {why}; solved again in float64", *solution.notes)
        return dataclasses.replace(solution, notes=notes)
    if not torch.isfinite(pairs.vectors).all():
        raise NonFiniteError(f"The eigenvectors of {layer} are not finite. Raise input_damping.")
    displacement = guidance.displacement
    norm = displacement.norm(start=pairs.vectors)
    divisor = norm if config.layer_steps == "equal" else 1.0
    return LayerSolution(
        basis_A=pairs.vectors.mT.contiguous(),
        basis_B=displacement.apply(pairs.vectors) / divisor,
        eigenvalues=pairs.eigenvalues / divisor**2,
        displacement_norm=norm,
        input_damping=factorized_input.damping,
        output_damping=output_damping,
        solver=pairs.solver,
        residual=residual,
        notes=factorized_input.notes,
    )


def _pose(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput,
    config: LoRADAConfig,
    layer: str,
    population_size: int,
) -> tuple[Guidance, float]:
    """Return the guidance matrix, in the dtype of the factorisation, and the output damping."""
    dtype = factorized_input.cholesky.dtype
    inverse_output, output_damping = inverse_output_factor(
        statistics.output_grad_second_moment_diag.to(dtype),
        Damping.parse(config.output_damping),
        layer=layer,
    )
    scaled_gradient = inverse_output[:, None] * statistics.weight_grad.to(dtype)
    guidance = build_guidance(
        Displacement(scaled_gradient=scaled_gradient, factorized_input=factorized_input),
        inverse_output,
        population_size=population_size,
        variance_weight=config.variance_weight,
        normalize_terms=config.normalize_guidance_terms,
    )
    return guidance, output_damping


def _residual_in_float64(statistics: LayerStatistics, guidance: Guidance, pairs: Eigenpairs) -> float:
    """Return the largest relative residual of ``Z^-1 V``, ``D^T D V`` and V as eigenvectors of G, measured in float64.

    It is done by blocks of rows: no statistic is copied whole.
    """
    displacement = guidance.displacement
    factorized = displacement.factorized_input
    narrow = displacement.factorized_input.solve(pairs.vectors)
    gram, solved = displacement.transposed_times_apply(narrow).double(), narrow.double()
    squares = torch.zeros_like(solved)
    for rows in displacement.scaled_gradient.split(_ROWS):
        wide = rows.double()
        squares += wide.mT @ (wide @ solved)
    missed = [
        (damped_product(statistics.input_second_moment, factorized.damping, found) - expected).norm() / expected.norm()
        for found, expected in ((solved, pairs.vectors.double()), (gram, squares))
    ]
    basis = torch.linalg.qr(pairs.vectors.double()).Q
    image = solved * guidance.variance_coefficient - gram
    outside = (image - basis @ (basis.mT @ image)).norm(dim=0).max() / pairs.eigenvalues.abs().max()
    return torch.stack([outside, *missed]).max().item()  # NaN if one of them is
