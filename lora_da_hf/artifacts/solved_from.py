"""Whether the stored statistics are those that the stored basis was solved from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from lora_da_hf.artifacts.basis import StoredBasis
from lora_da_hf.artifacts.statistics_store import iterate_statistics, statistics_files
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.errors import ArtifactError, NonFiniteError, SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.theory.kronecker import factorize_input
from lora_da_hf.theory.layer_scales import divisors
from lora_da_hf.theory.solve import solution_error, solve_dtype

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""By what a layer was solved in: a hundred roundings of the basis, which is stored in float32; or of the solve."""


def check_statistics(stored: StoredInit) -> None:
    """Look at every number of the stored statistics, if there are any, and compare them with the basis.

    Args:
        stored: What `load_init` returned.

    Raises:
        ArtifactError: as `iterate_statistics` and `check_solved_from`.
    """
    if not statistics_files(stored.manifest):
        return
    for group in iterate_statistics(stored.folder, stored.manifest):
        check_solved_from(group, stored)


def check_solved_from(statistics: Mapping[str, LayerStatistics], stored: StoredInit) -> None:
    """Verify that the stored basis is a solution of the stored statistics, with the stored settings.

    Nothing is solved again, so this costs a factorisation of the input second moment and a few products. It does not
    see what has no part in the basis: a change of the gradient that the basis maps to zero from both sides, and that
    leaves the displacement's norm.

    Args:
        statistics: Of layers that share an input.
        stored: What they belong to.

    Raises:
        ArtifactError: naming the layer.
    """
    config = LoRADAConfig.from_dict(stored.manifest.config)
    dtype = solve_dtype(config, stored.manifest.layers[next(iter(statistics))].in_features)
    errors = _errors(statistics, stored, config, dtype)
    missed = {name: error for name, error in errors.items() if not error <= _TOLERANCES[dtype]}
    if missed and dtype != torch.float64:  # as a solve goes to float64 where the narrower does not do
        again = {name: statistics[name] for name in missed}
        errors = _errors(again, stored, config, torch.float64)
        missed = {name: error for name, error in errors.items() if not error <= _TOLERANCES[dtype]}
    for name, error in missed.items():
        raise ArtifactError(
            f"{stored.folder}: the basis of {name} is not what comes of the stored statistics: it misses that by "
            f"{error:.1e} of its size. Fetch it again."
        )


def _errors(
    statistics: Mapping[str, LayerStatistics],
    stored: StoredInit,
    config: LoRADAConfig,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Return the error of the solution of each layer; infinity where the statistics could not have been solved."""
    leader, first = next(iter(statistics.items()))
    reports = {layer.name: layer for layer in stored.report.layers}
    by_layer = divisors(reports.values(), stored.report.step_unit, layer_steps=config.layer_steps)
    damping = stored.manifest.layers[leader].input_damping
    population = config.population_size or stored.manifest.data["population_size"]
    try:
        factorized = factorize_input(first.input_second_moment, Damping(amount=damping), layer=leader, dtype=dtype)
        if factorized.damping != damping:  # it had to be raised
            return dict.fromkeys(statistics, math.inf)
        return {
            name: solution_error(
                layer,
                factorized,
                dataclasses.replace(config, output_damping=stored.manifest.layers[name].output_damping),
                stored_solution(stored.bases[name], reports[name]),
                layer=name,
                population_size=population,
                divisor=by_layer[name],
            )
            for name, layer in statistics.items()
        }
    except (NonFiniteError, SolveError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        return dict.fromkeys(statistics, math.inf)


def stored_solution(basis: StoredBasis, report: LayerReport) -> LayerSolution:
    """Put the solution of a layer together from what is stored of it."""
    return LayerSolution(
        basis_A=basis.basis_A,
        basis_B=basis.basis_B,
        eigenvalues=basis.eigenvalues,
        displacement_norm=report.displacement_norm,
        input_damping=report.input_damping,
        output_damping=report.output_damping,
        solver=report.solver,
        residual=report.residual,
    )
