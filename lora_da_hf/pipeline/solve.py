"""The stages that collect the statistics and solve each layer: all layers at once, or a part of them in each pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.artifacts.tensors import save_statistics
from lora_da_hf.distributed.processes import Processes
from lora_da_hf.distributed.reduce import reduce_statistics
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.pipeline.gather import Gathered, PassCounts, check_any_gradient, gather_statistics
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.statistics.taps import input_groups
from lora_da_hf.theory.solve import solve_group
from lora_da_hf.theory.steps import divisors, rounding_notes, step_unit

Outcome = tuple[LayerSolution, LayerReport] | str
"""A layer's solution, on the CPU, and report; or why it keeps PEFT's own initialisation."""


_DIGITS = 1e3
"""Times the smallest normal number: squares below that lose digits, and then all of them."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The solution of each layer on the CPU, in the model's order, computed or read, and what there is to report."""

    solutions: dict[str, LayerSolution]
    layers: dict[str, LayerReport]
    kept: dict[str, str]
    step_unit: float
    notes: tuple[str, ...]


def solve_windows(job: Job, probe: Probe, plan: Plan, *, statistics: Path | None) -> tuple[Solved, PassCounts]:
    """Collect, reduce and solve the layers of each window; their sums are released before the next."""
    outcomes: dict[str, Outcome] = {}
    counts: list[PassCounts] = []
    for number, window in enumerate(plan.windows):
        with job.stage("statistics"):
            gathered = gather_statistics(job, probe, plan, window)
        with job.stage("solve"):
            mine, stored = _solve_window(
                job, gathered, plan, probe.splits.population_size, keeps=statistics is not None
            )
            if statistics is not None and stored:
                leaders = {name: o[1].shares_input_with for name, o in mine.items() if not isinstance(o, str)}
                save_statistics(statistics, stored, leaders, part=number)
            outcomes |= _share(job.processes, mine)
        counts.append(gathered.counts)
        del gathered, stored
    kept = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}
    check_any_gradient(kept, len(outcomes))
    if len(kept) == len(outcomes):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise SolveError(f"No layer could be solved. {reasons}. Check the samples and the loss.")
    return _in_one_unit(job, outcomes, kept), PassCounts.joined(counts)


def _in_one_unit(job: Job, outcomes: Mapping[str, Outcome], kept: Mapping[str, str]) -> Solved:
    """Divide all displacements by one number over their tokens, the same on every process."""
    layer_steps = job.config.layer_steps
    found = [(name, outcomes[name]) for name in job.targets]
    solved = {name: outcome for name, outcome in found if not isinstance(outcome, str)}
    layers = {name: layer for name, (_, layer) in solved.items()}
    unit = job.processes.gather(step_unit(layers.values(), layer_steps=layer_steps))[0]
    by_layer = divisors(layers.values(), unit, layer_steps=layer_steps)
    solutions = {name: solution.in_unit(by_layer[name]) for name, (solution, _) in solved.items()}
    return Solved(
        solutions=solutions,
        layers={n: dataclasses.replace(layers[n], eigenvalues=solutions[n].eigenvalues.tolist()) for n in layers},
        kept={**job.scan.kept, **{name: kept[name] for name in job.targets if name in kept}},
        step_unit=unit,
        notes=tuple(rounding_notes(layers.values(), layer_steps=layer_steps)),
    )


def _solve_window(
    job: Job, gathered: Gathered, plan: Plan, population_size: int, *, keeps: bool
) -> tuple[dict[str, Outcome], dict[str, LayerStatistics]]:
    """Reduce each group of layers to its owner, then solve those of this process and keep their statistics if asked.

    All sums are reduced before any is solved, so that the owners solve at the same time.
    """
    groups = input_groups(gathered.shared)
    counts = {"num_samples": gathered.counts.num_samples, "num_items": gathered.counts.num_items}
    reduced = dict(reduce_statistics(gathered.taps, groups, gathered.owners, job.processes, **counts))
    outcomes: dict[str, Outcome] = {}
    kept: dict[str, LayerStatistics] = {}

    def solve_one(leader: str) -> tuple[dict[str, Outcome], dict[str, LayerStatistics]]:
        layers = reduced.pop(leader)
        found = _solve_group(job, layers, gathered.kept, population_size)
        return found, {n: layers[n] for n in layers if not isinstance(found[n], str)} if keeps else {}

    device = next(iter(job.targets.values())).device
    with job.bar(len(groups), "LoRA-DA solve") as bar, full_precision(device.type), _map_on_threads(plan) as each:
        for found, layers in each(solve_one, list(reduced)):
            outcomes.update(found)
            kept |= layers
            bar.update(1)
    return outcomes, kept


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


def _is_subnormal(squares: Tensor) -> bool:
    """Tell whether squares are so small that some have lost their digits."""
    return bool(squares.mean() < _DIGITS * torch.finfo(squares.dtype).tiny)


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
        elif _is_subnormal(layer.output_grad_second_moment_diag):
            found[name] = "its gradient is too small to be squared in float32"
    wanted = {name: layer for name, layer in statistics.items() if name not in found}
    leader: str | None = None
    for name, solution in _solve_each(job, wanted, population_size).items():
        if isinstance(solution, str):
            found[name] = solution
            continue
        target, leader = job.targets[name], leader or name
        report = LayerReport(
            name=name,
            in_features=target.in_features,
            out_features=target.out_features,
            shares_input_with=leader,
            rank=target.rank,
            peft_scaling=target.peft_scaling,
            num_tokens=wanted[name].num_input_tokens,
            num_grad_tokens=wanted[name].num_output_tokens,
            **reported(solution),
        )
        found[name] = (solution.on("cpu"), report)
    return found


def _solve_each(
    job: Job, statistics: Mapping[str, LayerStatistics], population_size: int
) -> dict[str, LayerSolution | str]:
    """Solve layers that share an input, one by one if one fails: the solution of each, or why there is none."""
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


def reported(solution: LayerSolution) -> dict[str, Any]:
    """Return what a layer's report says of its solution."""
    numbers = ("input_damping", "output_damping", "displacement_norm", "solver", "residual")
    found = {name: getattr(solution, name) for name in numbers}
    return {**found, "eigenvalues": solution.eigenvalues.tolist(), "notes": list(solution.notes)}


def _share(processes: Processes, mine: dict[str, Outcome]) -> dict[str, Outcome]:
    """Give every process every outcome."""
    found: dict[str, Outcome] = {}
    for source in range(processes.count):
        found |= processes.broadcast(mine, source)
    return found
