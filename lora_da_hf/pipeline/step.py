"""The stage that decides how far step 0 goes, and the one that writes it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.adapters.trial import adapters_off, trial_adapters
from lora_da_hf.adapters.write import update_norm, write_factors
from lora_da_hf.distributed.parameters import settle
from lora_da_hf.errors import NonFiniteError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.pipeline.solve import Solved
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.theory.line_search import LineSearchResult, line_search
from lora_da_hf.theory.steps import factors_at_step, layer_lengths

logger = logging.getLogger(__name__)

_FIRST_STEP = 1.0
_FIRST_EQUAL_STEP = 0.1
"""Where all layers go equally far. On SmolLM2-135M searches ended at 1 to 3.2, and at 0.1 to 0.2 here."""

_LADDER_RATIO = 4
_LADDER_SAMPLES = 4
_FULL_PRECISION = 4
"""Bytes of a loss in which steps can be told apart."""


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
    notes: tuple[str, ...] = ()

    def noting(self, note: str, **changes: Any) -> Step:
        """Return the step with another note, and other values."""
        return replace(self, notes=(*self.notes, note), **changes)


def find_step(job: Job, solved: Solved, probe: Probe, *, for_other_ranks: bool) -> Step:
    """Decide the step: the config's, or the one of the lowest loss on the search samples. Nothing is written."""
    search, unseen = probe.splits.search, probe.splits.unseen
    step = Step(
        step_size=None if job.config.step_size is None or job.config.searches_step else float(job.config.step_size),
        num_search_samples=len(search),
        num_unseen_samples=len(unseen),
    )
    with adapters_off(job.scan.targets):
        if unseen:
            with job.stage("evaluate"):
                step = replace(step, unseen_loss_before=_finite(job.loss(unseen, probe.settings), unseen, "unseen"))
        if job.config.searches_step:
            with job.stage("line search"):
                step = _search(job, solved, probe, step, for_other_ranks=for_other_ranks)
    return step


def _search(job: Job, solved: Solved, probe: Probe, step: Step, *, for_other_ranks: bool) -> Step:
    """Search the step at the ranks of the layers, and for a ladder of ranks if that is asked for."""
    samples = probe.splits.search
    watched = _WatchedLoss(job.compute_loss)
    baseline = _finite(job.loss(samples, probe.settings, watched), samples, "search")
    dtype = max(job.processes.gather(watched.dtype), key=lambda found: torch.finfo(found).eps)
    resolution = torch.finfo(dtype).eps * abs(baseline) if dtype.itemsize < _FULL_PRECISION else 0.0
    bases = {name: (solution.basis_A, solution.basis_B) for name, solution in solved.solutions.items()}
    with trial_adapters([job.targets[name] for name in bases], bases) as trial:

        def search_at(rank: int | None, samples: list[Any], baseline: float, start: float) -> LineSearchResult:
            def evaluate(size: float) -> float:
                trial.rank, trial.step_size = rank, size
                return job.loss(samples, probe.settings)

            factor = 10**0.5 if rank is None else 2.0
            options: dict[str, Any] = {"start": start, "factor": factor, "refine": rank is None}
            return line_search(evaluate, baseline=baseline, resolution=resolution, **options)

        found = search_at(None, samples, baseline, _first_step(job, solved))
        by_rank = dict.fromkeys(_one_rank(job), found.step_size)
        part, rank = samples[:_LADDER_SAMPLES], max(job.max_ranks.values()) if for_other_ranks else 0
        trial.step_size = 0.0
        of_part = job.loss(part, probe.settings) if rank and len(part) < len(samples) else baseline
        start = found.step_size or _first_step(job, solved)
        while rank:  # each a quarter of the last, from its neighbour's step and on a few samples
            if rank not in by_rank:
                by_rank[rank] = search_at(rank, part, of_part, start).step_size
            start, rank = by_rank[rank] or start, rank // _LADDER_RATIO
    step = replace(
        step,
        step_size=found.step_size,
        step_size_by_rank=dict(sorted(by_rank.items())),
        search=[(size, loss if math.isfinite(loss) else None) for size, loss in found.evaluations],
        search_loss_before=baseline,
    )
    if len(found.alike) > 1 and resolution:
        alike = ", ".join(f"{size:.3g}" for size in found.alike)
        step = step.noting(
            f"the loss comes as {dtype}, in steps of {resolution:.2g} at {baseline:.4g}: {alike} cannot be told apart, "
            "and the smallest was taken. Have compute_loss return float32"
        )
    if not found.step_size:
        step = step.noting("no step lowers the loss on the search samples: B is zero, training starts at the base")
    return step


class _WatchedLoss:
    """A loss that notes the coarsest dtype that it came in."""

    def __init__(self, compute_loss: ComputeLoss) -> None:
        self._compute_loss = compute_loss
        self.dtype = torch.float64

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
        loss = self._compute_loss(model, batch, num_items)
        self.dtype = max(self.dtype, loss.dtype, key=lambda found: torch.finfo(found).eps)
        return loss


def _finite(loss: float, samples: list[Any], kind: str) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The loss of the {len(samples)} {kind} samples is {loss} without any adapter. Check the samples (labels "
            "inside the vocabulary) and the model's dtype."
        )
    return loss


def _first_step(job: Job, solved: Solved) -> float:
    """Return where a search begins: of a stored initialisation, the layer that goes farthest may be left out here."""
    if job.config.layer_steps == "equal":
        return _FIRST_EQUAL_STEP
    farthest = max(layer_lengths(solved.layers.values(), layer_steps=job.config.layer_steps).values())
    return _FIRST_STEP / min(farthest / solved.step_unit, 1.0)


def _one_rank(job: Job) -> set[int]:
    """Return the rank that all layers have, if they do: their step is then that of the ladder."""
    ranks = {target.rank for target in job.scan.targets}
    return ranks if len(ranks) == 1 else set()


def write_adapter(job: Job, solved: Solved, step: Step, probe: Probe | None) -> tuple[Step, list[LayerReport]]:
    """Write the factors, and measure the losses with what was written, in the dtype that is stored.

    If the loss on the search samples is above the base's after all, B is zero instead.
    """
    layers = _write(job, solved, step.step_size)
    if probe is None:
        return step, layers
    if probe.splits.search:
        with job.stage("line search"):
            after = job.loss(probe.splits.search, probe.settings)
        before = step.search_loss_before
        if step.step_size and before is not None and not after <= before:
            note = (
                f"step {step.step_size:.4g} gave a loss of {after:.6f} once it was stored in the adapter's dtype, "
                f"above the base's {before:.6f}: B is zero instead"
            )
            layers, after = _write(job, solved, 0.0), before
            by_rank = step.step_size_by_rank | dict.fromkeys(_one_rank(job), 0.0)
            step = step.noting(note, step_size=0.0, step_size_by_rank=by_rank)
        step = replace(step, search_loss_after=after)
    return (_measure_unseen(job, step, probe) if probe.splits.unseen else step), layers


def _measure_unseen(job: Job, step: Step, probe: Probe) -> Step:
    """Add the loss on the unseen samples, and a warning if it rose."""
    with job.stage("evaluate"):
        after = job.loss(probe.splits.unseen, probe.settings)
    before = step.unseen_loss_before
    if not math.isfinite(after):
        return step.noting(f"with the adapter, the loss on the unseen samples is {after}")
    if before is None or after <= before:
        return replace(step, unseen_loss_after=after)
    note = (
        f"on samples that nothing had seen the loss rose from {before:.4f} to {after:.4f}: those that the start was "
        "computed from may be too few, or unlike them"
    )
    if job.processes.is_main:
        logger.warning("LoRA-DA: %s. Give more samples, or train from the plain adapter.", note)
    return step.noting(note, unseen_loss_after=after)


def _write(job: Job, solved: Solved, size: float | None) -> list[LayerReport]:
    """Write every layer's factors at a step; None: each layer's follows from `stable_gamma`; 0: B is zero."""
    with job.stage("write"):
        for name, solution in solved.solutions.items():
            target = job.targets[name]
            basis_A, basis_B = (part.double() for part in solution.at_rank(target.rank))
            factors = factors_at_step(basis_A, basis_B, job.config, peft_scaling=target.peft_scaling, step_size=size)
            write_factors(target, *factors)
        settle(job.model)
        return [replace(layer, update_norm=update_norm(job.targets[name])) for name, layer in solved.layers.items()]
