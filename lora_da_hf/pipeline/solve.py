"""The stage that solves each layer at the process that owns it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lora_da_hf.adapters.targets import Target
from lora_da_hf.distributed.ranks import balanced_owners
from lora_da_hf.distributed.reduce import input_groups, reduce_statistics
from lora_da_hf.errors import SolveError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.collect import PassResult
from lora_da_hf.theory.solve import factorize, solve_layer

_Outcome = tuple[LayerSolution, LayerReport] | str
"""A layer's solution and report, or why it keeps PEFT's own initialisation."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The solution of each layer, in the model's order, and the statistics if they are to be stored."""

    solutions: dict[str, LayerSolution]
    statistics: dict[str, LayerStatistics]


def solve(job: Job, result: PassResult, shared: dict[str, str], population_size: int) -> Solved:
    """Reduce each group of layers to its owner, solve it there, and give the solution to everybody."""
    groups = input_groups(shared)
    size = 1 if job.config.save_statistics else job.ranks.size
    owners = balanced_owners({leader: _cost(job, leader, members) for leader, members in groups.items()}, size)
    solved = Solved(solutions={}, statistics={})
    mine: dict[str, _Outcome] = {}
    failure: Exception | None = None
    reduced = reduce_statistics(result.taps, groups, owners, job.ranks, num_samples=job.report.num_samples)
    with job.stage("solve"), job.bar(len(groups), "LoRA-DA solve") as bar:
        with job.ranks.together("solve"):
            for leader, statistics in reduced:  # every process must reduce every group, whatever fails
                if failure is None:
                    try:
                        mine.update(_solve_group(job, leader, statistics, population_size))
                    except Exception as error:
                        failure = error
                if job.config.save_statistics:
                    solved.statistics.update(statistics)
                bar.update(1)
            if failure is not None:
                raise failure
        _exchange(job, mine, solved.solutions)
    if not solved.solutions:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(job.report.kept.items())[:3])
        raise SolveError(f"No layer could be solved. {reasons}")
    return solved


def _cost(job: Job, leader: str, members: list[str]) -> float:
    d_in = job.targets[leader].in_features
    return d_in**3 / 3 + sum(4 * d_in * d_in * job.targets[name].out_features for name in members)


def _solve_group(
    job: Job, leader: str, statistics: dict[str, LayerStatistics], population_size: int
) -> dict[str, _Outcome]:
    found: dict[str, _Outcome] = {}
    names = [name for name in statistics if name not in job.report.kept]
    if not names:
        return found
    factorized = factorize(statistics[names[0]], job.config, layer=leader)
    for name in names:
        target = job.targets[name]
        if not statistics[name].weight_grad.any():
            found[name] = "its gradient is zero"
            continue
        solution = solve_layer(
            statistics[name],
            factorized,
            job.config,
            layer=name,
            rank=job.max_rank(target),
            population_size=population_size,
        )
        found[name] = (solution, _layer_report(target, statistics[name], solution))
    return found


def _layer_report(target: Target, statistics: LayerStatistics, solution: LayerSolution) -> LayerReport:
    return LayerReport(
        name=target.name,
        rank=target.rank,
        peft_scaling=target.peft_scaling,
        num_tokens=statistics.num_input_tokens,
        num_grad_tokens=statistics.num_output_tokens,
        input_damping=solution.input_damping,
        output_damping=solution.output_damping,
        eigenvalues=solution.eigenvalues.tolist(),
        displacement_norm=solution.displacement_norm,
        solver=solution.solver,
        residual=solution.residual,
        notes=list(solution.notes),
    )


def _exchange(job: Job, mine: dict[str, _Outcome], solutions: dict[str, LayerSolution]) -> None:
    """Give every process every outcome, in the model's order."""
    everything = mine
    if job.ranks.size > 1:
        on_cpu = {n: v if isinstance(v, str) else (_solution_to(v[0], "cpu"), v[1]) for n, v in mine.items()}
        everything = {name: v for part in job.ranks.gather(on_cpu) for name, v in part.items()}
    for name, target in job.targets.items():
        outcome = everything.get(name)
        if isinstance(outcome, str):
            job.report.kept[name] = outcome
        elif outcome is not None:
            solutions[name] = _solution_to(outcome[0], target.device)
            job.report.layers.append(outcome[1])


def _solution_to(solution: LayerSolution, device: torch.device | str) -> LayerSolution:
    return dataclasses.replace(
        solution,
        basis_A=solution.basis_A.to(device),
        basis_B=solution.basis_B.to(device),
        eigenvalues=solution.eigenvalues.to(device),
    )
