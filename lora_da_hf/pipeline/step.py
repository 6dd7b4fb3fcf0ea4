"""The stage that decides how far step 0 goes, and the one that writes it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.adapters.targets import Target
from lora_da_hf.adapters.trial import TrialAdapters
from lora_da_hf.adapters.write import update_norm, write_factors
from lora_da_hf.distributed.parameters import settle
from lora_da_hf.errors import NonFiniteError, WriteError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.records import LayerSolution
from lora_da_hf.samples import SampleSplits
from lora_da_hf.statistics.collect import PassSettings
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.theory.adapter_factors import factors_at_step
from lora_da_hf.theory.layer_scales import layer_lengths
from lora_da_hf.theory.line_search import LineSearchResult, line_search

logger = logging.getLogger(__name__)

_FIRST_STEP = 1.0
_FIRST_EQUAL_STEP = 0.1
"""Where all layers go equally far. On SmolLM2-135M searches ended at 1 to 3.2, and at 0.1 to 0.2 here."""

_LADDER_RATIO = 4
_LADDER_SAMPLES = 4
_FULL_PRECISION = 4
"""Bytes of a loss in which steps can be told apart."""


def find_step(
    job: Job, splits: SampleSplits, settings: PassSettings, solutions: dict[str, LayerSolution]
) -> float | None:
    """Decide the step: the config's, or the one of the lowest loss on the search samples.

    Nothing is written meanwhile. The report gets the steps tried, and the best step for a ladder of ranks.

    Returns:
        The step; 0 if none helps; None if each layer's follows from `stable_gamma`.
    """
    job.report.num_search_samples, job.report.num_unseen_samples = len(splits.search), len(splits.unseen)
    if splits.unseen:
        with job.stage("evaluate"):
            job.report.unseen_loss_before = _finite(job.loss(splits.unseen, settings), splits.unseen, "unseen")
    if not job.config.searches_step:
        job.report.step_size = None if job.config.step_size is None else float(job.config.step_size)
        return job.report.step_size
    bases = {name: (solution.basis_A, solution.basis_B) for name, solution in solutions.items()}
    with job.stage("line search"):
        watched = _WatchedLoss(job.compute_loss)
        baseline = _finite(job.loss(splits.search, settings, watched), splits.search, "search")
        dtype = max(job.ranks.gather(watched.dtype), key=lambda found: torch.finfo(found).eps)
        resolution = torch.finfo(dtype).eps * abs(baseline) if dtype.itemsize < _FULL_PRECISION else 0.0
        with TrialAdapters([job.targets[name] for name in solutions], bases) as trial:
            found = _search(job, trial, splits.search, settings, baseline, resolution)
            job.report.step_size_by_rank = _search_ladder(job, trial, splits.search, settings, found, resolution)
    job.report.search_loss_before = baseline
    job.report.search = [(step, loss if math.isfinite(loss) else None) for step, loss in found.evaluations]
    job.report.step_size = found.step_size
    if len(found.alike) > 1 and resolution:
        alike = ", ".join(f"{step:.3g}" for step in found.alike)
        job.report.notes.append(
            f"the loss comes as {dtype}, in steps of {resolution:.2g} at {baseline:.4g}: {alike} cannot be told apart, "
            "and the smallest was taken. Have compute_loss return float32"
        )
    if not found.helped:
        job.report.notes.append("no step lowers the loss on the search samples: B is zero, training starts at the base")
    return found.step_size


class _WatchedLoss:
    """A loss that notes the coarsest dtype that it came in.

    Args:
        compute_loss: The loss.
    """

    def __init__(self, compute_loss: ComputeLoss) -> None:
        self._compute_loss = compute_loss
        self.dtype = torch.float64

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
        loss = self._compute_loss(model, batch, num_items)
        if torch.finfo(loss.dtype).eps > torch.finfo(self.dtype).eps:
            self.dtype = loss.dtype
        return loss


def _finite(loss: float, samples: list[Any], kind: str) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The loss of the {len(samples)} {kind} samples is {loss} without any adapter. Check the samples (labels "
            "inside the vocabulary) and the model's dtype."
        )
    return loss


def _first_step(job: Job) -> float:
    """Return where a search begins: of a stored initialisation, the layer that goes farthest may be left out here."""
    if job.config.layer_steps == "equal":
        return _FIRST_EQUAL_STEP
    farthest = max(layer_lengths(job.report.layers, layer_steps=job.config.layer_steps).values())
    return _FIRST_STEP / min(farthest / job.report.step_unit, 1.0)


def _search(
    job: Job,
    trial: TrialAdapters,
    samples: list[Any],
    settings: PassSettings,
    baseline: float,
    resolution: float,
    *,
    rank: int | None = None,
    start: float | None = None,
) -> LineSearchResult:
    def evaluate(step: float) -> float:
        trial.rank, trial.step_size = rank, step
        return job.loss(samples, settings)

    factor = 10**0.5 if rank is None else 2.0
    return line_search(
        evaluate,
        baseline=baseline,
        start=start or _first_step(job),
        factor=factor,
        refine=rank is None,
        resolution=resolution,
    )


def _search_ladder(
    job: Job,
    trial: TrialAdapters,
    samples: list[Any],
    settings: PassSettings,
    found: LineSearchResult,
    resolution: float,
) -> dict[int, float]:
    """Search the step for a ladder of ranks, each a quarter of the last, from its neighbour's and on a few samples."""
    largest = max(job.max_ranks.values())
    ladder = [largest // _LADDER_RATIO**k for k in range(largest.bit_length()) if largest >= _LADDER_RATIO**k]
    by_rank = {target.rank: found.step_size for target in _of_one_rank(job)}
    if job.output_dir is None:  # only a stored initialisation is used at other ranks
        return by_rank
    part = samples[:_LADDER_SAMPLES]
    trial.step_size = 0.0
    baseline = found.baseline if len(part) == len(samples) else job.loss(part, settings)
    start = found.step_size or None
    for rank in ladder:
        if rank not in by_rank:
            by_rank[rank] = _search(job, trial, part, settings, baseline, resolution, rank=rank, start=start).step_size
        start = by_rank[rank] or start
    return dict(sorted(by_rank.items()))


def _of_one_rank(job: Job) -> list[Target]:
    """Return the layers if all have the same rank, of which their step is then that of the ladder, and none if not."""
    targets = list(job.targets.values())
    return targets if len({target.rank for target in targets}) == 1 else []


def write_adapter(
    job: Job,
    splits: SampleSplits,
    settings: PassSettings,
    solutions: dict[str, LayerSolution],
    step: float | None,
) -> None:
    """Write the factors, and measure the loss with what was written, in the dtype that is stored.

    If the loss on the search samples is above the base's after all, B is zero instead.
    """
    write_solutions(job, solutions, step)
    if splits.search:
        with job.stage("line search"):
            after = job.loss(splits.search, settings)
        before = job.report.search_loss_before
        if step and before is not None and not after <= before:
            job.report.notes.append(
                f"step {step:.4g} gave a loss of {after:.6f} once it was stored in the adapter's dtype, above the "
                f"base's {before:.6f}: B is zero instead"
            )
            write_solutions(job, solutions, 0.0)
            job.report.step_size, after = 0.0, before
            job.report.step_size_by_rank |= {target.rank: 0.0 for target in _of_one_rank(job)}
        job.report.search_loss_after = after
    if splits.unseen:
        with job.stage("evaluate"):
            after = job.loss(splits.unseen, settings)
        if math.isfinite(after):
            job.report.unseen_loss_after = after
            before = job.report.unseen_loss_before
            if before is not None and after > before:
                note = (
                    f"on samples that nothing had seen the loss rose from {before:.4f} to {after:.4f}: those that the "
                    "start was computed from may be too few, or unlike them"
                )
                job.report.notes.append(note)
                if job.ranks.rank == 0:
                    logger.warning("LoRA-DA: %s. Give more samples, or train from the plain adapter.", note)
        else:
            job.report.notes.append(f"with the adapter, the loss on the unseen samples is {after}")


def write_solutions(job: Job, solutions: dict[str, LayerSolution], step: float | None) -> None:
    """Write every layer's factors at a step; None: each layer's follows from `stable_gamma`; 0: B is zero."""
    with job.stage("write"), job.ranks.stage("write", has_collectives=job.writes_in_step, known=WriteError):
        for name, solution in solutions.items():
            target = job.targets[name]
            basis_A, basis_B = (part.to(target.device) for part in solution.at_rank(target.rank))
            scaling = target.peft_scaling
            factors = factors_at_step(basis_A, basis_B, job.config, peft_scaling=scaling, step_size=step)
            write_factors(target, *factors)
        settle(job.model)
        for layer in job.report.layers:
            layer.update_norm = update_norm(job.targets[layer.name])
