"""One layer, from its statistics to its subspace."""

from __future__ import annotations

import torch

from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.theory.displacement import displacement, spectral_norm
from lora_da_hf.theory.guidance import Guidance, build_guidance, check_residual_in_float64, lowest_subspace
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, inverse_output_factor
from lora_da_hf.theory.subspace import Eigenpairs

_FLOAT64_UP_TO = 8192
_FLOAT32_RESIDUAL = 1e-4


def solve_dtype(config: LoRADAConfig, input_width: int) -> torch.dtype:
    """Return the dtype that a layer of this input width is solved in."""
    if config.solve_dtype == "auto":
        return torch.float64 if input_width <= _FLOAT64_UP_TO else torch.float32
    return torch.float64 if config.solve_dtype == "float64" else torch.float32


def factorize(statistics: LayerStatistics, config: LoRADAConfig, *, layer: str) -> FactorizedInput:
    """Factorise the damped input second moment of a layer as the config says.

    Layers that are fed the same tensor have the same input second moment, so one factorisation serves them all.
    """
    return factorize_input(
        statistics.input_second_moment,
        Damping.parse(config.input_damping, "input_damping"),
        layer=layer,
        dtype=solve_dtype(config, statistics.input_second_moment.shape[0]),
    )


def solve_layer(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput,
    config: LoRADAConfig,
    *,
    layer: str,
    rank: int,
    population_size: int,
) -> LayerSolution:
    """Find the subspace that minimises bias plus variance for one layer.

    Args:
        statistics: Of this layer.
        factorized_input: What `factorize` returned for it, or for a layer that shares its input.
        config: Weights, dampings and solver.
        layer: The layer's name, for messages.
        rank: Rank to solve up to, at most d_in.
        population_size: N of the variance term.

    Returns:
        The solution, in the dtype of the solve.

    Raises:
        NonFiniteError: if a statistic is not finite.
        SolveError: if the gradient is zero, so that there is no direction to go.
    """
    if not torch.isfinite(statistics.weight_grad).all():
        raise NonFiniteError(f"The weight gradient of {layer} is not finite. Check the loss on the samples used.")
    if not statistics.weight_grad.any():
        raise SolveError(f"The weight gradient of {layer} is zero: no sample's loss depends on it.")
    dtype = factorized_input.cholesky.dtype
    output_diag = statistics.output_grad_second_moment_diag.to(dtype)
    inverse_output, output_damping = inverse_output_factor(
        output_diag, Damping.parse(config.output_damping, "output_damping"), layer=layer
    )
    step = displacement(statistics.weight_grad.to(dtype), inverse_output, factorized_input)
    norm = spectral_norm(step)
    guidance = build_guidance(
        step,
        inverse_output,
        factorized_input,
        displacement_norm=norm if config.normalize_displacement else 1.0,
        population_size=population_size,
        bias_weight=config.bias_weight,
        variance_weight=config.variance_weight,
        normalize_terms=config.normalize_guidance_terms,
    )
    pairs = lowest_subspace(guidance, rank, solver=config.solver)
    notes = list(factorized_input.notes)
    if config.solver == "krylov" and pairs.solver != "krylov":
        notes.append("Krylov did not converge; solved exactly")
    if dtype != torch.float64:
        guidance, pairs, note = _verified(guidance, pairs, rank, config.solver)
        notes += note
    if not torch.isfinite(pairs.vectors).all():
        raise NonFiniteError(f"The eigenvectors of {layer} are not finite. Raise input_damping.")
    return LayerSolution(
        basis_A=pairs.vectors.mT.contiguous(),
        basis_B=guidance.displacement @ pairs.vectors,
        eigenvalues=pairs.eigenvalues,
        displacement_norm=norm,
        input_damping=factorized_input.damping,
        output_damping=output_damping,
        solver=pairs.solver,
        residual=pairs.residual,
        notes=tuple(notes),
    )


def _verified(guidance: Guidance, pairs: Eigenpairs, rank: int, solver: str) -> tuple[Guidance, Eigenpairs, list[str]]:
    """Check a narrow solve in float64, and repeat it there if it misses the tolerance."""
    wide = Guidance(
        displacement=guidance.displacement.double(),
        factorized_input=FactorizedInput(
            cholesky=guidance.factorized_input.cholesky.double(), damping=guidance.factorized_input.damping
        ),
        bias_coefficient=guidance.bias_coefficient,
        variance_coefficient=guidance.variance_coefficient,
    )
    residual = check_residual_in_float64(wide, pairs)
    if residual <= _FLOAT32_RESIDUAL:
        checked = Eigenpairs(
            eigenvalues=pairs.eigenvalues, vectors=pairs.vectors, residual=residual, solver=pairs.solver
        )
        return guidance, checked, []
    note = f"float32 left a residual of {residual:.1e}; solved again in float64"
    return wide, lowest_subspace(wide, rank, solver=solver), [note]
