"""The passes of a plan, one after the other: all layers at once, or a part of them in each."""

from __future__ import annotations

from dataclasses import dataclass

from lora_da_hf.errors import SolveError
from lora_da_hf.pipeline.gather import check_any_gradient, gather_statistics
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.pipeline.resume import FinishedWindow, Progress
from lora_da_hf.pipeline.solve import solve
from lora_da_hf.records import LayerSolution
from lora_da_hf.theory.layer_scales import divisors, rounding_notes, step_unit


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The solution of each layer, in the model's order, and the leader of each layer."""

    solutions: dict[str, LayerSolution]
    shared: dict[str, str]


def solve_windows(job: Job, probe: Probe, plan: Plan, progress: Progress) -> Solved:
    """Collect, reduce and solve the layers of each window; their sums are released before the next.

    Raises:
        TapNotCalledError: if no gradient came back to any layer.
        SolveError: if a layer cannot be solved, or there is none to solve.
    """
    windows = [_solve_window(job, probe, plan, progress, number) for number in range(len(plan.windows))]
    outcomes = {name: outcome for window in windows for name, outcome in window.outcomes.items()}
    kept = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}
    check_any_gradient(kept, len(outcomes))
    _report_counts(job, windows)
    solutions: dict[str, LayerSolution] = {}
    for name in job.targets:
        outcome = outcomes[name]
        if isinstance(outcome, str):
            job.report.kept[name] = outcome
        else:
            solutions[name] = outcome[0]
            job.report.layers.append(outcome[1])
    if not solutions:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(job.report.kept.items())[:3])
        raise SolveError(f"No layer could be solved. {reasons}. Check the samples and the loss.")
    solutions = _in_one_unit(job, solutions)
    leaders = {name: leader for window in windows for name, leader in window.shared.items()}
    return Solved(solutions=solutions, shared={name: leaders[name] for name in probe.shared})


def _in_one_unit(job: Job, solutions: dict[str, LayerSolution]) -> dict[str, LayerSolution]:
    """Divide all displacements by one number over their tokens, the same on every process, and note it."""
    layers, layer_steps = job.report.layers, job.config.layer_steps
    with job.stage("solve"), job.ranks.together("solve"):
        unit = step_unit(layers, layer_steps=layer_steps)
    job.report.step_unit = unit = job.ranks.gather(unit)[0]
    job.report.notes += rounding_notes(layers, layer_steps=layer_steps)
    by_layer = divisors(layers, unit, layer_steps=layer_steps)
    scaled = {name: solution.in_unit(by_layer[name]) for name, solution in solutions.items()}
    for layer in job.report.layers:
        layer.eigenvalues = scaled[layer.name].eigenvalues.tolist()
    return scaled


def _solve_window(job: Job, probe: Probe, plan: Plan, progress: Progress, number: int) -> FinishedWindow:
    finished = progress.finished(number)
    if finished is None:
        gathered = gather_statistics(job, probe, plan, plan.windows[number], progress.store(number))
        solved = solve(job, gathered, probe.splits.population_size, plan)
        shared = {name: leader for part in job.ranks.gather(gathered.shared) for name, leader in part.items()}
        finished = FinishedWindow(outcomes=solved.outcomes, shared=shared, counts=gathered.counts)
        progress.finish(number, finished, solved)
    return finished


def _report_counts(job: Job, windows: list[FinishedWindow]) -> None:
    counts = windows[0].counts
    job.report.num_samples, job.report.num_unlabelled = counts.num_samples, counts.num_unlabelled
    job.report.batch_size = min(window.counts.batch_size for window in windows)
    job.report.notes += sorted({note for window in windows for note in window.counts.notes})
    if counts.num_unlabelled:
        job.report.notes.append(f"{counts.num_unlabelled} samples have no label and were left out")
