"""The stages that collect the statistics and solve each layer: all layers at once, or a part of them in each pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lora_da_hf.artifacts.tensors import save_statistics
from lora_da_hf.distributed.processes import Processes, reduce_statistics
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.collect import PassCounts, collect, in_batches
from lora_da_hf.statistics.model_state import seed_generators
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.statistics.taps import Taps, input_groups
from lora_da_hf.theory.solve import solve_group
from lora_da_hf.theory.steps import divisors, rounding_notes, step_unit

Outcome = tuple[LayerSolution, LayerReport] | str
"""A layer's solution, on the CPU, and report; or why it keeps PEFT's own initialisation."""

_UNCALLED = "it is never called: no sample goes through it, or the model uses its weight in other code"
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
            taps, found = _collect(job, probe, window)
        counts.append(found)
        with job.stage("solve"):
            mine, stored = _solve_window(job, probe, plan, taps, found, keeps=statistics is not None)
            if statistics is not None and stored:
                leaders = {name: o[1].shares_input_with for name, o in mine.items() if not isinstance(o, str)}
                save_statistics(statistics, stored, leaders, part=number)
            outcomes |= _share(job.processes, mine)
        del taps, stored
    notes = tuple(sorted({note for window in counts for note in window.notes}))
    if counts[0].num_unlabelled:
        notes += (f"{counts[0].num_unlabelled} samples have no label and were left out",)
    size = min(window.batch_size for window in counts)
    return _join(job, outcomes), dataclasses.replace(counts[0], batch_size=size, notes=notes)


def _join(job: Job, outcomes: Mapping[str, Outcome]) -> Solved:
    """Put together what came of all layers."""
    found = [(name, outcomes[name]) for name in job.targets]
    kept = {name: outcome for name, outcome in found if isinstance(outcome, str)}
    solved = {name: outcome for name, outcome in found if not isinstance(outcome, str)}
    if not solved:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise SolveError(
            f"No layer could be solved. {reasons}. Check that the loss is not cut off from the model, and initialise "
            "before torch.compile and without fused kernels, which go around the modules."
        )
    solutions, layers, unit = in_one_unit(
        {name: solution for name, (solution, _) in solved.items()},
        {name: layer for name, (_, layer) in solved.items()},
        job.config.layer_steps,
    )
    notes = tuple(rounding_notes(layers.values(), layer_steps=job.config.layer_steps))
    return Solved(solutions=solutions, layers=layers, kept={**job.scan.kept, **kept}, step_unit=unit, notes=notes)


def in_one_unit(
    solutions: Mapping[str, LayerSolution], layers: Mapping[str, LayerReport], layer_steps: str
) -> tuple[dict[str, LayerSolution], dict[str, LayerReport], float]:
    """Divide all displacements by one number over their tokens, the same on every process, and return it too."""
    unit = step_unit(layers.values(), layer_steps=layer_steps)
    by_layer = divisors(layers.values(), unit, layer_steps=layer_steps)
    scaled = {name: solutions[name].in_unit(by_layer[name]) for name in layers}
    eigenvalues = {name: solution.eigenvalues.tolist() for name, solution in scaled.items()}
    return scaled, {n: dataclasses.replace(layers[n], eigenvalues=eigenvalues[n]) for n in layers}, unit


def _collect(job: Job, probe: Probe, window: tuple[str, ...]) -> tuple[Taps, PassCounts]:
    """Run the pass for the layers of a window, over this process's share of the samples.

    The input of a group of layers is summed in the backward pass of its leader. Should a gradient reach a layer and not
    its leader, the pass is repeated with those layers apart.
    """
    shared = {name: leader for name, leader in probe.shared.items() if leader in window}
    (taps, mine), again = _run_pass(job, probe, shared), list[str]()
    apart = _groups_with_different_counts(job, taps)
    if apart:
        again = [f"{len(apart)} layers that share an input got gradients on their own: collected again"]
        del taps  # the sums go before the next ones are there
        taps, mine = _run_pass(job, probe, {n: n if leader in apart else leader for n, leader in shared.items()})
    counts = job.processes.gather(mine)
    return taps, PassCounts(
        num_samples=sum(part.num_samples for part in counts),
        num_items=sum(part.num_items for part in counts),
        num_unlabelled=sum(part.num_unlabelled for part in counts),
        batch_size=min(part.batch_size for part in counts),
        notes=tuple(chain(again, *(part.notes for part in counts))),
    )


def _groups_with_different_counts(job: Job, taps: Taps) -> set[str]:
    """Return the leaders of groups in which a layer that got gradients counted other tokens than the leader."""
    totals = job.processes.sum([tap.num_tokens for tap in taps.taps.values()])
    counts = dict(zip(taps.taps, totals, strict=True))
    leaders = {name: (tap.leader or tap).name for name, tap in taps.taps.items()}
    return {leader for name, leader in leaders.items() if counts[name] and counts[name] != counts[leader]}


def _run_pass(job: Job, probe: Probe, shared: dict[str, str]) -> tuple[Taps, PassCounts]:
    mine = job.processes.share(probe.splits.statistics)

    def make_taps() -> Taps:
        return Taps(
            {name: job.targets[name].base_layer for name in shared},
            widths={name: (job.targets[name].in_features, job.targets[name].out_features) for name in shared},
            shared_inputs=shared,
            devices={name: job.targets[name].device for name in shared},
            dtype=torch.promote_types(torch.float32, job.scan.targets[0].lora_A.dtype),
        )

    seed_generators(job.seed)  # a collator that draws gives the same batches again, whatever was run before
    with job.bar(len(mine), "LoRA-DA statistics") as bar, job.collate.generators_kept():
        return in_batches(probe.settings, lambda settings: collect(mine, settings, make_taps, bar.update))


def _without_gradient(job: Job, taps: Taps) -> dict[str, str]:
    """Find the layers that no sample went through, or that the loss does not depend on."""
    calls = job.processes.sum([tap.forward_calls for tap in taps.taps.values()])
    returns = job.processes.sum([tap.backward_calls for tap in taps.taps.values()])
    reasons: dict[str, str] = {}
    for name, called, returned in zip(taps.taps, calls, returns, strict=True):
        if not called:
            reasons[name] = "no token is routed to it" if job.targets[name].is_routed else _UNCALLED
        elif not returned:
            reasons[name] = "the loss does not depend on it"
    return reasons


def _solve_window(
    job: Job, probe: Probe, plan: Plan, taps: Taps, counts: PassCounts, *, keeps: bool
) -> tuple[dict[str, Outcome], dict[str, LayerStatistics]]:
    """Reduce each group of layers to its owner, then solve those of this process and keep their statistics if asked.

    All sums are reduced before any is solved, so that the owners solve at the same time.
    """
    kept, population_size = _without_gradient(job, taps), probe.splits.population_size
    groups = input_groups({name: (tap.leader or tap).name for name, tap in taps.taps.items()})
    owners = {leader: plan.owners[probe.shared[leader]] for leader in groups}
    divided_by = {"num_samples": counts.num_samples, "num_items": counts.num_items}
    reduced = dict(reduce_statistics(taps, groups, owners, job.processes, **divided_by))
    outcomes: dict[str, Outcome] = {}
    stored: dict[str, LayerStatistics] = {}

    def solve_one(leader: str) -> tuple[dict[str, Outcome], dict[str, LayerStatistics]]:
        layers = reduced.pop(leader)
        found = _solve_group(job, layers, kept, population_size)
        return found, {n: layers[n] for n in layers if not isinstance(found[n], str)} if keeps else {}

    device = job.scan.targets[0].device.type
    with job.bar(len(groups), "LoRA-DA solve") as bar, full_precision(device), _map_on_threads(plan) as each:
        for found, layers in each(solve_one, list(reduced)):
            outcomes.update(found)
            stored |= layers
            bar.update(1)
    return outcomes, stored


@contextlib.contextmanager
def _map_on_threads(plan: Plan) -> Generator[Callable[..., Iterator[Any]]]:
    """Give a map that runs as many calls at once as groups are to be solved at the same time.

    What a call computes with, one thread or all of torch's, depends on the layers alone: so do the bits.
    """
    if not plan.one_thread_each:
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(plan.solvers) as executor:
            yield executor.map if plan.solvers > 1 else map
    finally:
        torch.set_num_threads(threads)


def _solve_group(
    job: Job, statistics: Mapping[str, LayerStatistics], kept: Mapping[str, str], population_size: int
) -> dict[str, Outcome]:
    """Solve layers that share an input, but for those that say nothing."""
    found: dict[str, Outcome] = {}
    for name, layer in statistics.items():
        squares = layer.output_grad_second_moment_diag
        if name in kept:
            found[name] = kept[name]
        elif not layer.num_input_tokens or not layer.num_output_tokens:
            found[name] = "no token that counts goes through it"
        elif not layer.weight_grad.any():
            found[name] = "its gradient is zero"
        elif squares.mean() < _DIGITS * torch.finfo(squares.dtype).tiny:
            found[name] = "its gradient is too small to be squared in float32"
    wanted = {name: layer for name, layer in statistics.items() if name not in found}
    leader: str | None = None
    for name, solution in (_solve_each(job, wanted, population_size) if wanted else {}).items():
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
