"""The passes of a plan, one after the other: all layers at once, or a part of them in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lora_da_hf.errors import SolveError
from lora_da_hf.pipeline.gather import PassCounts, check_any_gradient, gather_statistics
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.pipeline.solve import Outcome, solve_window
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport
from lora_da_hf.theory.layer_scales import divisors, rounding_notes, step_unit


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The solution of each layer, in the model's order, computed or stored.

    Attributes:
        solutions: On the CPU, by layer.
        layers: What there is to report of each.
        kept: Layers that keep PEFT's own initialisation, with the reason.
        step_unit: What the displacements over tokens were divided by.
        notes: What a user should know.
    """

    solutions: dict[str, LayerSolution]
    layers: dict[str, LayerReport]
    kept: dict[str, str]
    step_unit: float
    notes: tuple[str, ...]


def solve_windows(job: Job, probe: Probe, plan: Plan, *, statistics: Path | None) -> tuple[Solved, PassCounts]:
    """Collect, reduce and solve the layers of each window; their sums are released before the next.

    Args:
        job: The job.
        probe: What the probe found.
        plan: What is done when.
        statistics: Where the process that solves puts the statistics; None: they are not stored.

    Raises:
        TapNotCalledError: if no gradient came back to any layer.
        SolveError: if no layer can be solved.
    """
    outcomes: dict[str, Outcome] = {}
    counts: list[PassCounts] = []
    for number, window in enumerate(plan.windows):
        with job.stage("statistics"):
            gathered = gather_statistics(job, probe, plan, window)
        with job.stage("solve"):
            population_size = probe.splits.population_size
            outcomes |= solve_window(
                job, gathered, plan, population_size=population_size, statistics=statistics, number=number
            )
        counts.append(gathered.counts)
        del gathered
    kept = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}
    check_any_gradient(kept, len(outcomes))
    solved = [outcomes[name] for name in job.targets if not isinstance(outcomes[name], str)]
    if not solved:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise SolveError(f"No layer could be solved. {reasons}. Check the samples and the loss.")
    return _in_one_unit(job, outcomes), _joined(counts)


def _joined(counts: Collection[PassCounts]) -> PassCounts:
    """Return what the passes over all windows counted, which each saw the same samples."""
    first = next(iter(counts))
    notes = tuple(sorted({note for window in counts for note in window.notes}))
    if first.num_unlabelled:
        notes += (f"{first.num_unlabelled} samples have no label and were left out",)
    return dataclasses.replace(first, batch_size=min(window.batch_size for window in counts), notes=notes)


def _in_one_unit(job: Job, outcomes: dict[str, Outcome]) -> Solved:
    """Divide all displacements by one number over their tokens, the same on every process."""
    solutions: dict[str, LayerSolution] = {}
    layers: dict[str, LayerReport] = {}
    kept = dict(job.scan.kept)
    for name in job.targets:
        outcome = outcomes[name]
        if isinstance(outcome, str):
            kept[name] = outcome
        else:
            solutions[name], layers[name] = outcome
    layer_steps = job.config.layer_steps
    unit = job.processes.gather(step_unit(layers.values(), layer_steps=layer_steps))[0]
    by_layer = divisors(layers.values(), unit, layer_steps=layer_steps)
    solutions = {name: solution.in_unit(by_layer[name]) for name, solution in solutions.items()}
    return Solved(
        solutions=solutions,
        layers={
            name: dataclasses.replace(layer, eigenvalues=solutions[name].eigenvalues.tolist())
            for name, layer in layers.items()
        },
        kept=kept,
        step_unit=unit,
        notes=tuple(rounding_notes(layers.values(), layer_steps=layer_steps)),
    )
