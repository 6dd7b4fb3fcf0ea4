"""One layer, from its statistics to its subspace."""

from __future__ import annotations

import torch

from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.theory.guidance import Displacement, build_guidance, lowest_subspace
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, inverse_output_factor


def factorize(statistics: LayerStatistics, config: LoRADAConfig, *, layer: str) -> FactorizedInput:
    """Factorise the damped input second moment of a layer."""
    return factorize_input(statistics.input_second_moment, Damping.parse(config.input_damping), layer=layer)


def solve_layer(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput,
    config: LoRADAConfig,
    *,
    layer: str,
    rank: int,
    population_size: int,
) -> LayerSolution:
    """Find the subspace of ``rank`` that minimises bias plus variance for one layer, in float64.

    ``factorized_input`` is what `factorize` returned for it, or for a layer that shares its input.

    Raises:
        NonFiniteError: if a statistic is not finite.
        SolveError: if the eigenproblem cannot be solved.
    """
    if not all(part.isfinite().all() for part in (statistics.weight_grad, statistics.output_grad_second_moment_diag)):
        raise NonFiniteError(f"The gradients of {layer} are not finite. Check the loss on the samples used.")
    inverse_output, output_damping = inverse_output_factor(
        statistics.output_grad_second_moment_diag.double(), Damping.parse(config.output_damping), layer=layer
    )
    displacement = Displacement(
        scaled_gradient=inverse_output[:, None] * statistics.weight_grad, factorized_input=factorized_input
    )
    guidance = build_guidance(
        displacement,
        inverse_output,
        population_size=population_size,
        variance_weight=config.variance_weight,
        normalize_terms=config.normalize_guidance_terms,
    )
    try:
        pairs = lowest_subspace(guidance, rank)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolveError(
            f"The eigenproblem of {layer} cannot be solved: {error} Raise input_damping and output_damping."
        ) from error
    if not torch.isfinite(pairs.vectors).all():
        raise NonFiniteError(f"The eigenvectors of {layer} are not finite. Raise input_damping.")
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
        residual=pairs.residual,
        notes=factorized_input.notes,
    )
