"""One layer, from its statistics to its subspace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.theory.displacement import Displacement
from lora_da_hf.theory.fisher_metric import WhitenedLayer
from lora_da_hf.theory.guidance import Guidance, build_guidance, check_residual_in_float64, lowest_subspace
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, inverse_output_factor
from lora_da_hf.theory.layer_scales import row_scale

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


def solve_group(
    statistics: Mapping[str, LayerStatistics],
    config: LoRADAConfig,
    *,
    ranks: Mapping[str, int],
    population_size: int,
) -> dict[str, LayerSolution]:
    """Solve layers that share an input, and so the factorisation of its second moment, as `solve_layer` does.

    Args:
        statistics: By layer; the first lends its name to messages about the input.
        config: As for `solve_layer`.
        ranks: To solve up to, by layer.
        population_size: N of the variance term.
    """
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
    """Find the subspace that minimises bias plus variance for one layer, in the metric that the config names.

    Under ``metric="fisher"`` this is the truncated singular value decomposition of the displacement in the coordinates
    of `WhitenedLayer`, mapped back. The variance of each direction is the same there, so the variance term shifts all
    eigenvalues by one number: it changes no subspace, and says which directions are worth a rank.

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
        SolveError: if the gradient is zero, so that there is no direction to go; the eigenproblem cannot be solved; or
            a length or a norm that the settings ask for does not exist.
    """
    if not torch.isfinite(statistics.weight_grad).all():
        raise NonFiniteError(f"The weight gradient of {layer} is not finite. Check the loss on the samples used.")
    if not statistics.weight_grad.any():
        raise SolveError(
            f"The weight gradient of {layer} is zero: no sample's loss depends on it. Leave it out of target_modules."
        )
    dtype = factorized_input.cholesky.dtype
    problem = _pose(statistics, factorized_input, config, layer=layer, population_size=population_size)
    displacement, whitened, guidance = problem.displacement, problem.whitened, problem.guidance
    notes = list(factorized_input.notes)

    def solve_in_float64(found: str) -> LayerSolution:
        wide = dataclasses.replace(config, solve_dtype="float64")
        factorized = factorize(statistics, wide, layer=layer)
        again = solve_layer(statistics, factorized, wide, layer=layer, rank=rank, population_size=population_size)
        return dataclasses.replace(again, notes=(*notes, f"float32 {found}; solved again in float64", *again.notes))

    try:
        pairs = lowest_subspace(guidance, rank, solver=config.solver)
        residual = pairs.residual if dtype == torch.float64 else check_residual_in_float64(guidance, pairs)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        if dtype != torch.float64:
            return solve_in_float64("overflowed")
        raise SolveError(
            f"The eigenproblem of {layer} cannot be solved in float64: {error} The displacement is likely too long to "
            "be squared. Raise input_damping and output_damping."
        ) from error
    if whitened is None:
        basis_A, basis_B = pairs.vectors.mT.contiguous(), displacement.apply(pairs.vectors)
    else:
        basis_A, basis_B = whitened.map_back(pairs.vectors)
    if config.solver == "krylov" and pairs.solver != "krylov":
        notes.append("Krylov did not converge, or not for the smallest eigenvalues; solved exactly")
    if dtype != torch.float64:
        residual = _larger(residual, _solve_residual(statistics, displacement, basis_A.mT, factorized_input.damping))
        if not residual <= _FLOAT32_RESIDUAL:
            return solve_in_float64(f"left a residual of {residual:.1e}")
    if not torch.isfinite(basis_A).all():
        raise NonFiniteError(f"The eigenvectors of {layer} are not finite. Raise input_damping.")
    norm = displacement.norm(start=pairs.vectors if whitened is None else torch.linalg.qr(basis_A.mT).Q)
    divisor = norm if config.layer_steps == "equal" else 1.0
    scale = _scale(statistics, basis_A, config, layer=layer)
    return LayerSolution(
        basis_A=basis_A * scale,
        basis_B=basis_B / (divisor * scale),
        eigenvalues=pairs.eigenvalues / divisor**2,
        displacement_norm=norm,
        input_damping=factorized_input.damping,
        output_damping=problem.output_damping,
        solver=pairs.solver,
        residual=residual,
        notes=tuple(notes),
    )


def _scale(statistics: LayerStatistics, basis_A: Tensor, config: LoRADAConfig, *, layer: str) -> float:
    """Return what the rows of A, of norm 1, are multiplied with."""
    if config.projected_rms is None:
        return 1.0
    return row_scale(statistics, basis_A, config.projected_rms, layer=layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """What is solved for one layer: D, G, and the layer in the coordinates of the Fisher norm if that is the metric."""

    displacement: Displacement
    whitened: WhitenedLayer | None
    guidance: Guidance
    output_damping: float


def _pose(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput,
    config: LoRADAConfig,
    *,
    layer: str,
    population_size: int,
) -> _Problem:
    """Put together what is to be solved, in the dtype of the factorisation."""
    dtype = factorized_input.cholesky.dtype
    inverse_output, output_damping = inverse_output_factor(
        statistics.output_grad_second_moment_diag.to(dtype),
        Damping.parse(config.output_damping, "output_damping"),
        layer=layer,
    )
    weight_grad = statistics.weight_grad.to(dtype)
    displacement = Displacement.of(weight_grad, inverse_output, factorized_input)
    whitened = WhitenedLayer.of(weight_grad, inverse_output, factorized_input) if config.metric == "fisher" else None
    guidance = build_guidance(
        displacement if whitened is None else whitened.displacement,
        inverse_output if whitened is None else whitened.inverse_output_factor,
        population_size=population_size,
        bias_weight=config.bias_weight,
        variance_weight=config.variance_weight,
        normalize_terms=config.normalize_guidance_terms,
    )
    return _Problem(displacement=displacement, whitened=whitened, guidance=guidance, output_damping=output_damping)


def solution_error(
    statistics: LayerStatistics,
    factorized_input: FactorizedInput,
    config: LoRADAConfig,
    solution: LayerSolution,
    *,
    layer: str,
    population_size: int,
    divisor: float = 1.0,
) -> float:
    """Measure how far a solution is from being one of these statistics, without solving anything again.

    ``basis_B`` must be the displacement times the input basis, the basis must be made of eigenvectors of the guidance
    matrix with these eigenvalues, and the displacement must have this norm. That they are the lowest eigenvectors is
    not looked at. Steps and norms per layer must be those of the settings.

    Args:
        statistics: Of this layer.
        factorized_input: Of it, as for `solve_layer`.
        config: That it was solved with.
        solution: Its tensors may be rounded to float32.
        layer: The layer's name, for messages.
        population_size: That it was solved with.
        divisor: What its displacement was divided by since, as `lora_da_hf.theory.layer_scales.divisors` has it.

    Returns:
        The largest of these errors. Each is relative to what goes into it, so that it is of the order of the
        roundings if the solution is one.

    Raises:
        SolveError: if the output factor has no inverse, or a length that the settings ask for does not exist.
    """
    problem = _pose(statistics, factorized_input, config, layer=layer, population_size=population_size)
    displacement, whitened, guidance = problem.displacement, problem.whitened, problem.guidance
    cholesky = factorized_input.cholesky
    rows, columns, scale = solution.basis_A.to(cholesky), solution.basis_B.to(cholesky), 1.0
    if config.projected_rms is not None:
        scale = rows[0].norm().item()
        rows, columns = rows / scale, columns * scale
    if whitened is None:
        vectors, images = rows.mT, displacement.apply(rows.mT)
        start = vectors
    else:
        vectors = cholesky.mT @ rows.mT
        vectors = vectors / vectors.norm(dim=0)
        images, start = whitened.map_back(vectors)[1], rows.mT
    norm = displacement.norm(start=torch.linalg.qr(start).Q)
    expected_scale = _scale(statistics, rows, config, layer=layer)
    divisor *= solution.displacement_norm if config.layer_steps == "equal" else 1.0
    eigenvalues = solution.eigenvalues.to(cholesky) * (divisor * divisor)
    missed_images = (images - columns * divisor).norm(dim=0).max().item()
    missed_eigen = (guidance.apply(vectors) - vectors * eigenvalues).norm(dim=0).max().item()
    largest = norm if whitened is None else guidance.displacement.apply(vectors).norm(dim=0).max().item()
    pivot = cholesky.diagonal().min().item() if whitened is None else 1.0
    size = guidance.bias_coefficient * largest * largest + abs(guidance.variance_coefficient) / pivot / pivot
    errors = (
        _relative(abs(norm - solution.displacement_norm), norm),
        _relative(abs(scale - expected_scale), expected_scale),
        _relative(missed_images, max(norm, images.norm(dim=0).max().item())),
        _relative(missed_eigen, max(size, eigenvalues.abs().max().item())),
    )
    return max(errors)


def _relative(error: float, size: float) -> float:
    """Return a part, and infinity where there is none to tell."""
    return error / size if size and math.isfinite(error) and math.isfinite(size) else math.inf


def _solve_residual(statistics: LayerStatistics, displacement: Displacement, vectors: Tensor, damping: float) -> float:
    """Measure in float64 how far the solves with a narrower Cholesky factor miss their right-hand sides.

    Args:
        statistics: Of the layer.
        displacement: D, in the narrower dtype.
        vectors: ``[d_in, r]``, of which ``Z^-1`` and D^T D are taken.
        damping: In Z.

    Returns:
        The larger relative residual.
    """
    moment = statistics.input_second_moment.double()
    damped = (moment + moment.mT) * 0.5
    damped.diagonal().add_(damping)
    gradient = displacement.scaled_gradient.double()
    solved = displacement.solve_input(vectors)
    gram = displacement.transposed_times_apply(solved)
    missed = 0.0
    for found, expected in ((solved, vectors.double()), (gram, gradient.mT @ (gradient @ solved.double()))):
        error = damped @ found.double() - expected
        missed = _larger(missed, (error.norm() / expected.norm()).item())
    return missed


def _larger(first: float, second: float) -> float:
    """Return the larger of two, and NaN if one of them is, which `max` returns by their order."""
    return first if first > second or math.isnan(first) else second
