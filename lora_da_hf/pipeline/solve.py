"""The stage that solves each layer at the process that owns it, and gives the solution to everybody."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_da_hf.adapters.targets import Target
from lora_da_hf.artifacts.statistics_store import save_statistics
from lora_da_hf.distributed.processes import Processes
from lora_da_hf.distributed.reduce import reduce_statistics
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.pipeline.gather import Gathered
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.records import SOLUTION_TENSORS, LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.statistics.taps import input_groups
from lora_da_hf.theory.solve import solve_group

Outcome = tuple[LayerSolution, LayerReport] | str
"""A layer's solution, on the CPU, and report; or why it keeps PEFT's own initialisation."""


def solve_window(
    job: Job, gathered: Gathered, plan: Plan, *, population_size: int, statistics: Path | None, number: int
) -> dict[str, Outcome]:
    """Reduce each group of layers to its owner, solve it there, and give the solution to everybody.

    All sums are reduced before any is solved, so that the owners solve at the same time.

    Args:
        job: The job.
        gathered: The sums.
        plan: How many groups to solve at the same time.
        population_size: N.
        statistics: Folder that the process which solves writes the statistics to; None: they are not stored.
        number: The window's.
    """
    groups = input_groups(gathered.shared)
    counts = {"num_samples": gathered.counts.num_samples, "num_items": gathered.counts.num_items}
    reduced = dict(reduce_statistics(gathered.taps, groups, gathered.owners, job.processes, **counts))
    mine: dict[str, Outcome] = {}
    stored: dict[str, LayerStatistics] = {}

    def solve_one(leader: str) -> tuple[dict[str, Outcome], dict[str, LayerStatistics]]:
        layers = reduced.pop(leader)
        found = _solve_group(job, layers, gathered.kept, population_size)
        kept = {} if statistics is None else {n: layers[n] for n in layers if not isinstance(found[n], str)}
        return found, kept

    device = next(iter(job.targets.values())).device
    with job.bar(len(groups), "LoRA-DA solve") as bar, full_precision(device.type), _map_on_threads(plan) as each:
        for found, layers in each(solve_one, list(reduced)):
            mine.update(found)
            stored |= layers
            bar.update(1)
    if statistics is not None and stored:
        shared = {name: o[1].shares_input_with for name, o in mine.items() if not isinstance(o, str)}
        save_statistics(statistics, stored, shared, part=number)
    outcomes = _share(job.processes, mine)
    return {name: outcomes[name] for name in job.targets if name in outcomes}


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


def _solve_group(
    job: Job, statistics: Mapping[str, LayerStatistics], kept: Mapping[str, str], population_size: int
) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for name, layer in statistics.items():
        if name in kept:
            found[name] = kept[name]
        elif not layer.num_input_tokens or not layer.num_output_tokens:
            found[name] = "no token that counts goes through it"
        elif not layer.weight_grad.any():
            found[name] = "its gradient is zero"
        elif not layer.output_grad_second_moment_diag.any():
            found[name] = "its gradient is too small to be squared in float32"
    wanted = {name: layer for name, layer in statistics.items() if name not in found}
    solved: dict[str, LayerSolution] = {}
    for name, solution in _solve_each(job, wanted, population_size).items():
        if isinstance(solution, str):
            found[name] = solution
        else:
            solved[name] = solution
    for name, solution in solved.items():
        report = _layer_report(job.targets[name], wanted[name], solution, leader=next(iter(solved)))
        found[name] = (solution.on("cpu"), report)
    return found


def _solve_each(
    job: Job, statistics: Mapping[str, LayerStatistics], population_size: int
) -> dict[str, LayerSolution | str]:
    """Solve layers that share an input: together, or one by one if one fails. Gives the solution, or why there is none."""
    if not statistics:
        return {}
    try:
        return {**solve_group(statistics, job.config, ranks=job.max_ranks, population_size=population_size)}
    except (NonFiniteError, SolveError) as error:
        if len(statistics) == 1:
            return dict.fromkeys(statistics, f"it cannot be solved ({error})")
        found: dict[str, LayerSolution | str] = {}
        for name, layer in statistics.items():
            found |= _solve_each(job, {name: layer}, population_size)
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


def _share(processes: Processes, mine: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Give every process every outcome: each sends what it has without the tensors, and the tensors in one message."""
    bare = {name: o if isinstance(o, str) else (o[0].on("meta"), o[1]) for name, o in mine.items()}
    found: dict[str, Outcome] = {}
    for source, outcomes in enumerate(processes.gather(bare)):
        found |= outcomes
        solved = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, str)}
        specs = [(tensor.shape, tensor.dtype) for solution, _ in solved.values() for tensor in solution.tensors]
        own = [tensor for o in mine.values() if not isinstance(o, str) for tensor in o[0].tensors]
        received = iter(processes.broadcast(own if source == processes.index else None, specs, source))
        for name, (solution, report) in solved.items():
            tensors = {field: next(received).cpu() for field in SOLUTION_TENSORS}
            found[name] = (dataclasses.replace(solution, **tensors), report)
    return found
