"""One layer, from its statistics to where its adapter starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lora_da_hf.config import STARTS, Damping, LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics, is_finite
from lora_da_hf.theory.guidance import Displacement
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, inverse_output_factor
from lora_da_hf.theory.starts import (
    Directions,
    gradient_start,
    inputs_start,
    natural_gradient_start,
    whitened_gradient_start,
)
from lora_da_hf.theory.subspace import TOLERANCE

LOOSE = 1e-5
"""Of what is stored in 8 bits, and of what others look for less closely."""


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
    if not (is_finite(statistics.weight_grad) and is_finite(statistics.output_grad_second_moment_diag)):
        raise NonFiniteError(f"The gradients of {layer} are not finite. Check the loss on the samples used.")
    output_damping, gradient = 0.0, statistics.weight_grad
    options: dict[str, Any] = {"rank": rank, "tolerance": tolerance}
    try:
        if config.start == "inputs":
            found = inputs_start(statistics, layer=layer, **options)
        elif config.start == "gradient" or factorized_input is None:
            found = gradient_start(gradient, **options)
        else:
            inverse_output, output_damping = inverse_output_factor(
                statistics.output_grad_second_moment_diag.double(), Damping.parse(config.output_damping), layer=layer
            )
            displacement = Displacement(
                scaled_gradient=inverse_output[:, None] * gradient, factorized_input=factorized_input
            )
            if config.start == "whitened_gradient":
                found = whitened_gradient_start(displacement, gradient, factorized_input, **options)
            else:
                options["population_size"] = population_size
                found = natural_gradient_start(displacement, inverse_output, config, **options)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolveError(
            f"The eigenproblem of {layer} cannot be solved: {error} Raise input_damping and output_damping."
        ) from error
    return _solution(found, factorized_input, config, output_damping=output_damping, layer=layer)


def _solution(
    found: Directions, factorized: FactorizedInput | None, config: LoRADAConfig, *, output_damping: float, layer: str
) -> LayerSolution:
    if not is_finite(found.rows):
        raise NonFiniteError(f"The eigenvectors of {layer} are not finite. Raise input_damping.")
    divisor = found.norm if config.lengths == "equal" else 1.0
    return LayerSolution(
        basis_A=found.rows,
        basis_B=found.columns / divisor,
        eigenvalues=found.pairs.eigenvalues / divisor**2,
        displacement_norm=found.norm,
        input_damping=0.0 if factorized is None else factorized.damping,
        output_damping=output_damping,
        solver=found.pairs.solver,
        residual=found.pairs.residual,
        notes=() if factorized is None else factorized.notes,
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
        other, factorized = dataclasses.replace(config, start=start), None
        for name, layer in list(statistics.items())[: 1 if start == "inputs" else None]:
            factorized = factorized or factorize(layer, other, layer=name)
            rank = largest if start == "inputs" else ranks[name]
            options: dict[str, Any] = {"rank": rank, "population_size": population_size, "tolerance": LOOSE}
            found[name][start] = solve_layer(layer, factorized, other, layer=name, **options)
    return found
