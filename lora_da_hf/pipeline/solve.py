"""The stage that solves each layer at the process that owns it, and gives the solution to everybody."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from lora_da_hf.adapters.targets import Target
from lora_da_hf.distributed.reduce import reduce_statistics
from lora_da_hf.pipeline.gather import UNCOUNTED, Gathered
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.statistics.taps import input_groups
from lora_da_hf.theory.solve import solve_group

Outcome = tuple[LayerSolution, LayerReport] | str
"""A layer's solution and report, or why it keeps PEFT's own initialisation."""

SOLUTION_TENSORS = ("basis_A", "basis_B", "eigenvalues")


@dataclass(frozen=True, kw_only=True)
class SolvedWindow:
    """What came of the layers of a window.

    Attributes:
        outcomes: By layer, the same on every process.
        statistics: What they came of, in the process that stores it and if it is to be stored.
    """

    outcomes: dict[str, Outcome]
    statistics: dict[str, LayerStatistics]


def solve(job: Job, gathered: Gathered, population_size: int, plan: Plan) -> SolvedWindow:
    """Reduce each group of layers to its owner, solve it there, and give the solution to everybody.

    All sums are reduced before any is solved, so that the owners solve at the same time.

    Args:
        job: The job.
        gathered: The sums.
        population_size: N.
        plan: How many groups to solve at the same time.
    """
    groups = input_groups(gathered.shared)
    mine: dict[str, Outcome] = {}
    stored: dict[str, LayerStatistics] = {}
    with job.stage("solve"), job.bar(len(groups), "LoRA-DA solve") as bar:
        with job.ranks.stage("reduction", has_collectives=gathered.ranks.size > 1):
            reduced = _reduce(gathered, groups)
        with job.ranks.together("solve"):

            def solve_one(leader: str) -> tuple[dict[str, Outcome], dict[str, LayerStatistics]]:
                statistics = reduced.pop(leader)
                found = _solve_group(job, statistics, gathered.kept, population_size)
                return found, statistics if job.config.save_statistics else {}

            device = next(iter(job.targets.values())).device
            with full_precision(device.type), _map_on_threads(plan) as each:
                for found, statistics in each(solve_one, list(reduced)):
                    mine.update(found)
                    stored.update(statistics)
                    bar.update(1)
        outcomes = share_outcomes(job, mine)
    return SolvedWindow(outcomes=outcomes, statistics=stored)


@contextlib.contextmanager
def _map_on_threads(plan: Plan) -> Generator[Callable[..., Iterator[Any]]]:
    """Give a map that runs as many calls at once as groups are to be solved at the same time.

    What a call computes with, one thread or all of torch's, depends on the layers alone: so do the bits.
    """
    if not plan.one_thread_each:
        yield map
        return
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(plan.solvers)
    torch.set_num_threads(1)
    try:
        yield executor.map if plan.solvers > 1 else map
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _reduce(gathered: Gathered, groups: Mapping[str, list[str]]) -> dict[str, dict[str, LayerStatistics]]:
    if gathered.result is None:
        return {}
    counts = {"num_samples": gathered.counts.num_samples, "num_items": gathered.counts.num_items}
    return dict(reduce_statistics(gathered.result.taps, groups, gathered.owners, gathered.ranks, **counts))


def _solve_group(
    job: Job, statistics: dict[str, LayerStatistics], kept: Mapping[str, str], population_size: int
) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {name: kept[name] for name in statistics if name in kept}
    for name, layer in statistics.items():
        if name in found:
            continue
        if not layer.num_input_tokens or not layer.num_output_tokens:
            found[name] = UNCOUNTED
        elif not layer.weight_grad.any():
            found[name] = "its gradient is zero"
    names = [name for name in statistics if name not in found]
    if not names:
        return found
    wanted = {name: statistics[name] for name in names}
    solutions = solve_group(wanted, job.config, ranks=job.max_ranks, population_size=population_size)
    for name, solution in solutions.items():
        report = _layer_report(job.targets[name], statistics[name], solution, leader=next(iter(solutions)))
        found[name] = (solution, report)
    return found


def _layer_report(target: Target, statistics: LayerStatistics, solution: LayerSolution, *, leader: str) -> LayerReport:
    return LayerReport(
        name=target.name,
        in_features=target.in_features,
        out_features=target.out_features,
        shares_input_with=leader,
        rank=target.rank,
        peft_scaling=target.peft_scaling,
        num_tokens=statistics.num_input_tokens,
        num_grad_tokens=statistics.num_output_tokens,
        **reported(solution),
    )


def reported(solution: LayerSolution) -> dict[str, Any]:
    """Return what a layer's report says of its solution."""
    return {
        "input_damping": solution.input_damping,
        "output_damping": solution.output_damping,
        "eigenvalues": solution.eigenvalues.tolist(),
        "displacement_norm": solution.displacement_norm,
        "solver": solution.solver,
        "residual": solution.residual,
        "notes": list(solution.notes),
    }


def share_outcomes(job: Job, mine: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Give every process every outcome, in the model's order: each broadcasts the tensors that it has.

    They wait in the CPU's memory, since those of all windows are kept until the adapter is written.
    """
    described = {name: outcome if isinstance(outcome, str) else describe(*outcome) for name, outcome in mine.items()}
    found: dict[str, Outcome] = {}
    for source, outcomes in enumerate(job.ranks.gather(described)):
        found |= {name: reason for name, reason in outcomes.items() if isinstance(reason, str)}
        solved = {name: facts for name, facts in outcomes.items() if not isinstance(facts, str)}
        specs = [
            (shape, getattr(torch, dtype)) for facts in solved.values() for shape, dtype in facts["tensors"].values()
        ]
        own = [outcome[0] for outcome in mine.values() if not isinstance(outcome, str)]
        tensors = [getattr(solution, which) for solution in own for which in SOLUTION_TENSORS]
        received = iter(job.ranks.broadcast(tensors if source == job.ranks.rank else None, specs, source))
        for name, facts in solved.items():
            found[name] = outcome_of(facts, {which: next(received).cpu() for which in SOLUTION_TENSORS})
    return {name: found[name] for name in job.targets if name in found}


def describe(solution: LayerSolution, report: LayerReport) -> dict[str, Any]:
    """Return everything of a solution but its tensors as plain JSON values, with their shapes and dtypes."""
    names = [field.name for field in dataclasses.fields(solution) if field.name not in SOLUTION_TENSORS]
    tensors = {which: getattr(solution, which) for which in SOLUTION_TENSORS}
    return {
        "solution": {name: getattr(solution, name) for name in names},
        "report": dataclasses.asdict(report),
        "tensors": {w: (list(t.shape), str(t.dtype).removeprefix("torch.")) for w, t in tensors.items()},
    }


def outcome_of(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[LayerSolution, LayerReport]:
    """Put together what `describe` took apart."""
    solution: dict[str, Any] = {**facts["solution"], "notes": tuple(facts["solution"]["notes"]), **tensors}
    return LayerSolution(**solution), LayerReport(**facts["report"])
