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

from lora_da_hf.artifacts.leading import save_leading
from lora_da_hf.artifacts.tensors import save_statistics
from lora_da_hf.distributed.processes import reduce_statistics, sum_counts
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.collect import PassCounts, collect, in_batches
from lora_da_hf.statistics.model_state import seed_generators
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.statistics.taps import LayerTap, Taps
from lora_da_hf.theory.solve import factorize, solve_layer, solve_other_starts
from lora_da_hf.theory.steps import in_one_unit, rounding_notes

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
            taps, counted = _collect(job, probe, plan, window)
        counts.append(counted)
        with job.stage("solve"):
            mine, stored = _solve_window(job, probe, plan, taps, counted, keeps=statistics is not None)
            if statistics is not None and stored and job.config.save_statistics == "leading":
                save_leading(statistics, stored, part=number)
            elif statistics is not None and stored:
                leaders = {name: o[1].shares_input_with for name, o in mine.items() if not isinstance(o, str)}
                save_statistics(statistics, stored, leaders, part=number)
            for source in range(job.processes.count):
                outcomes |= job.processes.broadcast(mine, source)
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
        layer_steps=job.config.lengths,
    )
    notes = tuple(rounding_notes(layers.values(), layer_steps=job.config.lengths))
    return Solved(solutions=solutions, layers=layers, kept={**job.scan.kept, **kept}, step_unit=unit, notes=notes)


def _collect(job: Job, probe: Probe, plan: Plan, window: tuple[str, ...]) -> tuple[Taps, PassCounts]:
    """Run the pass for the layers of a window, over this process's share of the samples; counts are all processes'.

    The input of a group of layers is summed in the backward pass of its leader. Should a gradient reach a layer and not
    its leader, the pass is repeated with those layers apart.
    """
    shared = {name: leader for name, leader in probe.shared.items() if leader in window}
    (taps, mine), again = _run_pass(job, probe, plan, shared), list[str]()
    apart = {
        leader
        for leader, (first, *others) in taps.groups.items()
        if any(tap.num_tokens and tap.num_tokens != first.num_tokens for tap in others)
    }
    if apart:
        again = [f"{len(apart)} layers that share an input got gradients on their own: collected again"]
        del taps  # the sums go before the next ones are there
        taps, mine = _run_pass(job, probe, plan, {n: n if leader in apart else leader for n, leader in shared.items()})
    counts = job.processes.gather(mine)
    sums = {n: sum(getattr(part, n) for part in counts) for n in ("num_samples", "num_items", "num_unlabelled")}
    notes = tuple(chain(again, *(part.notes for part in counts)))
    return taps, PassCounts(**sums, batch_size=min(part.batch_size for part in counts), notes=notes)


def _run_pass(job: Job, probe: Probe, plan: Plan, shared: dict[str, str]) -> tuple[Taps, PassCounts]:
    mine = job.processes.share(probe.splits.statistics)

    def make_taps() -> Taps:
        return Taps(
            {name: job.targets[name].base_layer for name in shared},
            widths={name: (job.targets[name].in_features, job.targets[name].out_features) for name in shared},
            shared_inputs=shared,
            devices={name: job.targets[name].device for name in shared},
            dtype=torch.promote_types(torch.float32, job.scan.targets[0].lora_A.dtype),
            on_host={name for name in shared if probe.shared[name] in plan.on_host},
        )

    seed_generators(job.seed)  # a collator that draws gives the same batches again, whatever was run before
    with job.bar(len(mine), "LoRA-DA statistics") as bar, job.collate.generators_kept():
        taps, counts = in_batches(probe.settings, lambda settings: collect(mine, settings, make_taps, bar.update))
    sum_counts(taps, job.processes)
    return taps, counts


def _solve_window(
    job: Job, probe: Probe, plan: Plan, taps: Taps, counts: PassCounts, *, keeps: bool
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Reduce each group of layers to its owner, then solve those of this process.

    If asked, keep their statistics, or with ``save_statistics="leading"`` the solutions of the other starts. All sums
    are reduced before any is solved, so that the owners solve at the same time.
    """
    owners = {leader: plan.owners[probe.shared[leader]] for leader in taps.groups}
    divided_by = {"num_samples": counts.num_samples, "num_items": counts.num_items}
    reduced = reduce_statistics(taps, owners, job.processes, **divided_by)
    outcomes: dict[str, Outcome] = {}
    stored: dict[str, Any] = {}

    def solve_one(leader: str) -> tuple[dict[str, Outcome], dict[str, Any]]:
        layers = reduced.pop(leader)
        size = probe.splits.population_size
        on_device = _moved(layers, job.targets[leader].device)
        solved = _solve_group(job, taps, on_device, size)
        kept = {n: layers[n] for n in layers if not isinstance(solved[n], str)} if keeps else {}
        if kept and job.config.save_statistics == "leading":
            kept = {name: on_device[name] for name in kept}
            return solved, solve_other_starts(kept, job.config, ranks=job.max_ranks, population_size=size)
        return solved, kept

    device = job.scan.targets[0].device.type
    with job.bar(len(reduced), "LoRA-DA solve") as bar, full_precision(device), _map_on_threads(plan) as each:
        for solved, layers in each(solve_one, list(reduced)):
            outcomes |= solved
            stored |= layers
            bar.update(1)
    return outcomes, stored


def _moved(layers: dict[str, LayerStatistics], device: torch.device) -> dict[str, LayerStatistics]:
    """Return statistics whose matrices are on a device: layers that share an input share its moment there, too."""
    moment: Any = next(iter(layers.values())).input_second_moment
    moment = dataclasses.replace(moment, entries=moment.entries.to(device))
    return {
        name: dataclasses.replace(layer, input_second_moment=moment, weight_grad=layer.weight_grad.to(device))
        for name, layer in layers.items()
    }


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
    job: Job, taps: Taps, statistics: Mapping[str, LayerStatistics], population_size: int
) -> dict[str, Outcome]:
    """Solve layers that share an input, but for those that say nothing."""
    outcomes: dict[str, Outcome] = {}
    leader = factorized = None
    for name, layer in statistics.items():
        target = job.targets[name]
        why = _why_silent(layer, taps.taps[name], is_routed=target.is_routed)
        if why is not None:
            outcomes[name] = why
            continue
        try:
            factorized = factorized or factorize(layer, job.config, layer=name)
            solution = solve_layer(
                layer, factorized, job.config, layer=name, rank=job.max_ranks[name], population_size=population_size
            )
        except (NonFiniteError, SolveError) as error:
            outcomes[name] = f"it cannot be solved ({error})"
            continue
        leader = leader or name
        report = LayerReport(
            name=name,
            in_features=target.in_features,
            out_features=target.out_features,
            shares_input_with=leader,
            rank=target.rank,
            peft_scaling=target.peft_scaling,
            num_tokens=layer.num_input_tokens,
            num_grad_tokens=layer.num_output_tokens,
            **reported(solution),
        )
        outcomes[name] = (solution.on("cpu"), report)
    return outcomes


def _why_silent(layer: LayerStatistics, tap: LayerTap, *, is_routed: bool) -> str | None:
    """Return why the statistics of a layer say nothing, if they do not."""
    squares = layer.output_grad_second_moment_diag
    reasons = {
        "no token is routed to it" if is_routed else _UNCALLED: not tap.forward_calls,
        "the loss does not depend on it": not tap.backward_calls,
        "no token that counts goes through it": not (layer.num_input_tokens and layer.num_output_tokens),
        "its gradient is zero": not layer.weight_grad.any(),
        "its gradient is too small to be squared in float32": squares.mean()
        < _DIGITS * torch.finfo(squares.dtype).tiny,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def reported(solution: LayerSolution) -> dict[str, Any]:
    """Return what a layer's report says of its solution."""
    numbers = ("input_damping", "output_damping", "displacement_norm", "solver", "residual")
    values = {name: getattr(solution, name) for name in numbers}
    return {**values, "eigenvalues": solution.eigenvalues.tolist(), "notes": list(solution.notes)}
