"""The stage that decides how far step 0 goes, and the one that writes it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lora_da_hf.adapters.trial import adapters_off, trial_adapters
from lora_da_hf.adapters.write import read_factors, update_norm, write_factors
from lora_da_hf.distributed.parameters import settle
from lora_da_hf.errors import NonFiniteError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.pipeline.solve import Solved
from lora_da_hf.report import LayerReport
from lora_da_hf.theory.line_search import Losses, line_search
from lora_da_hf.theory.solve import INPUTS_HAVE_NO_STEP
from lora_da_hf.theory.steps import factors_at_step, layer_lengths

logger = logging.getLogger(__name__)

_FIRST_STEP = 1.0
_FIRST_EQUAL_STEP = 0.1
"""Where all layers go equally far. On SmolLM2-135M searches ended at 1 to 3.2, and at 0.1 to 0.2 here."""

_LADDER_RATIO = 4
_LEAST_ON_LADDER = 4


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far step 0 goes, and the losses that say so, by the names that they have in the report."""

    step_size: float | None
    step_size_by_rank: dict[int, float] = field(default_factory=dict[int, float])
    search: list[tuple[float, float | None]] = field(default_factory=list[tuple[float, float | None]])
    num_search_samples: int = 0
    num_unseen_samples: int = 0
    search_loss_before: float | None = None
    search_loss_after: float | None = None
    unseen_loss_before: float | None = None
    unseen_loss_after: float | None = None
    unseen_loss_error: float | None = None
    notes: tuple[str, ...] = ()

    def noting(self, note: str, **changes: Any) -> Step:
        """Return the step with another note, and other values."""
        return replace(self, notes=(*self.notes, note), **changes)


def find_step(job: Job, solved: Solved, probe: Probe, *, for_other_ranks: bool) -> Step:
    """Decide the step: the config's, or the one that the search samples choose. Nothing is written."""
    step = given_step(job)
    if job.config.searches_step:
        with adapters_off(job.scan.targets), job.stage("line search"):
            step = _search(job, solved, probe, step, for_other_ranks=for_other_ranks)
    return step


def given_step(job: Job) -> Step:
    """Return the step that the config gives; None, too, if it is to be searched."""
    given = job.config.step_size
    if job.config.start == "inputs":
        return Step(step_size=0.0, notes=(INPUTS_HAVE_NO_STEP,))
    return Step(step_size=None if given is None or job.config.searches_step else float(given))


def _search(job: Job, solved: Solved, probe: Probe, step: Step, *, for_other_ranks: bool) -> Step:
    """Search the step at the ranks of the layers, and for a ladder of ranks if that is asked for."""
    samples = probe.splits.search
    baseline = _finite(job.losses(samples, probe.settings), samples, "search")
    bases = {name: (solution.basis_A, solution.basis_B) for name, solution in solved.solutions.items()}
    with trial_adapters([job.targets[name] for name in bases], bases) as trial:

        def evaluate(samples: list[Any], rank: int | None, size: float) -> Losses:
            trial.rank, trial.step_size = rank, size
            return job.losses(samples, probe.settings)

        at_own_ranks = functools.partial(evaluate, samples, None)
        found = line_search(at_own_ranks, baseline=baseline, start=_first_step(job, solved))
        ranks = {target.rank for target in job.scan.targets}  # one that all layers have is on the ladder
        by_rank = dict.fromkeys(ranks if len(ranks) == 1 else (), found.step_size)
        if for_other_ranks and found.step_size:
            on_part = functools.partial(evaluate, samples[: max(_LEAST_ON_LADDER, len(samples) // _LADDER_RATIO)])
            by_rank |= _search_ladder(job, on_part, found.step_size, by_rank)
    step = replace(
        step,
        step_size=found.step_size,
        step_size_by_rank=dict(sorted(by_rank.items())),
        search=[(size, loss if math.isfinite(loss) else None) for size, loss in found.evaluations],
        search_loss_before=baseline.mean,
        search_loss_after=found.loss,
    )
    if not found.step_size:
        alone = " (one batch tells none: give more samples)" if len(baseline.batches) == 1 else ""
        why = f"no step lowers the loss on {len(samples)} search samples beyond its error{alone}"
        step = _noting_no_step(job, step, why)
    return step


def _noting_no_step(job: Job, step: Step, why: str) -> Step:
    """Say in report and log that B stays zero, and why."""
    note = f"{why}, so B stays zero, as in plain LoRA"
    if job.processes.is_main:
        logger.warning("LoRA-DA: %s.", note)
    losses = {"search_loss_after": step.search_loss_before, "unseen_loss_after": step.unseen_loss_before}
    losses["unseen_loss_error"] = None
    return step.noting(note, step_size=0.0, step_size_by_rank=dict.fromkeys(step.step_size_by_rank, 0.0), **losses)


def _search_ladder(
    job: Job, evaluate: Callable[[int | None, float], Losses], start: float, known: Mapping[int, float]
) -> dict[int, float]:
    """Return the step of the largest rank and of each quarter of the last, searched from its neighbour's.

    A quarter of the samples has to do; a longer step has to earn its length on them, too.
    """
    baseline, steps, rank = evaluate(None, 0.0), dict(known), max(job.max_ranks.values())
    while rank:
        if rank not in steps:
            at_rank = functools.partial(evaluate, rank)
            steps[rank] = line_search(at_rank, baseline=baseline, start=start, factor=2.0, refine=False).step_size
        start, rank = steps[rank] or start, rank // _LADDER_RATIO
    return steps


def _finite(losses: Losses, samples: list[Any], kind: str) -> Losses:
    if not math.isfinite(losses.mean):
        raise NonFiniteError(
            f"The loss of the {len(samples)} {kind} samples is {losses.mean} without any adapter. Check the samples "
            "(labels inside the vocabulary) and the model's dtype."
        )
    return losses


def _first_step(job: Job, solved: Solved) -> float:
    """Return where a search begins: of a stored initialisation, the layer that goes farthest may be left out here."""
    if job.config.lengths == "equal":
        return _FIRST_EQUAL_STEP
    farthest = max(layer_lengths(solved.layers.values(), layer_steps=job.config.lengths).values())
    return _FIRST_STEP / min(farthest / solved.step_unit, 1.0)


def write_adapter(job: Job, solved: Solved, step: Step, probe: Probe | None) -> tuple[Step, list[LayerReport]]:
    """Write the factors, and measure the loss with what was written, in the dtype that is stored.

    A searched step has to lower it, on samples that nothing had seen, by more than the standard error of that. If it
    does not, the adapter is as PEFT made it.
    """
    if probe is None:
        return step, _write(job, solved, step.step_size)
    search, unseen, before = probe.splits.search, probe.splits.unseen, Losses(())
    step = replace(step, num_search_samples=len(search), num_unseen_samples=len(unseen))
    if unseen:
        with adapters_off(job.scan.targets), job.stage("evaluate"):
            before = _finite(job.losses(unseen, probe.settings), unseen, "unseen")
            step = replace(step, unseen_loss_before=before.mean)
    fresh = {name: read_factors(job.targets[name]) for name in solved.solutions} if step.search else {}
    layers, why_not = _write(job, solved, step.step_size), None
    if step.step_size == 0:
        return replace(step, unseen_loss_after=step.unseen_loss_before), layers
    if unseen:
        with job.stage("evaluate"):
            step, why_not = _compare(step, before, job.losses(unseen, probe.settings))
    if why_not is None:
        return step, layers
    if step.search:
        return _noting_no_step(job, step, why_not), _write(job, solved, 0.0, fresh)
    if job.processes.is_main:
        logger.warning("LoRA-DA: %s. Search the step on this data, or train from the plain adapter.", why_not)
    return step.noting(why_not), layers


def _compare(step: Step, before: Losses, after: Losses) -> tuple[Step, str | None]:
    """Add the loss on the unseen samples, and say what is wrong with it: a given step only must not raise it."""
    gain, error = before.mean - after.mean, after.error_beside(before)
    unseen = f"on {step.num_unseen_samples} samples that nothing had seen, the loss"
    if not math.isfinite(after.mean):
        return step, f"{unseen} is {after.mean} with the adapter"
    known = error if math.isfinite(error) else None  # one sample tells none
    step = replace(step, unseen_loss_after=after.mean, unseen_loss_error=known)
    if gain <= 0:
        return step, f"{unseen} did not fall (from {before.mean:.4f} to {after.mean:.4f})"
    if step.search and gain <= error:
        return step, f"{unseen} fell by {gain:.4f} ± {error:.4f}, which may be chance"
    return step, None


def _write(
    job: Job, solved: Solved, size: float | None, fresh: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> list[LayerReport]:
    """Write every layer's factors at a step; None: each layer's follows from `stable_gamma`.

    At step 0 the factors are the fresh ones, those that are there by default: the subspace alone was not seen to help.
    If A is frozen, or the start has no step, A is all that an initialisation can give, and spans the subspace.
    """
    with job.stage("write"):
        for name, solution in solved.solutions.items():
            target = job.targets[name]
            if size == 0 and not job.config.keeps_a_without_step:
                if fresh:
                    write_factors(target, *fresh[name])
                continue
            basis_A, basis_B = (part.double() for part in solution.at_rank(target.rank))
            factors = factors_at_step(basis_A, basis_B, job.config, peft_scaling=target.peft_scaling, step_size=size)
            write_factors(target, *factors)
        settle(job.model)
        return [replace(layer, update_norm=update_norm(job.targets[name])) for name, layer in solved.layers.items()]
