"""What a few samples tell before the pass: how the loss is made, and which layers share an input."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.adapters.backward import checked_backward
from lora_da_hf.adapters.trial import outputs_moved
from lora_da_hf.errors import DataError
from lora_da_hf.losses import (
    is_encoder_decoder,
    longest_labels,
    make_labelled_head,
    max_sample_length,
    shifts_labels,
    takes_loss_alone,
)
from lora_da_hf.pipeline.job import Job
from lora_da_hf.samples import SampleSplits
from lora_da_hf.statistics.batches import check_lengths
from lora_da_hf.statistics.collect import PassSettings
from lora_da_hf.statistics.in_batches import why_not_in_batches
from lora_da_hf.statistics.labelled_head import LabelledHead
from lora_da_hf.statistics.loss_reduction import (
    DRAWS_AT_RANDOM,
    ComputeLoss,
    choose_unlike,
    draws_at_random,
    find_reduction,
)
from lora_da_hf.statistics.model_state import apart_by_checkpoint, without_checkpointing
from lora_da_hf.statistics.sequences import followed_sequences, watched_rows
from lora_da_hf.statistics.taps import SizeTaps, find_shared_inputs
from lora_da_hf.statistics.token_masks import is_packed, read_batch_tokens, tell_sequences_apart

_PROBED_SAMPLES = 64
"""Samples with a label among which the few that are run are chosen."""
_SAME_LOSS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a few samples tell about the job.

    Attributes:
        splits: The samples, with labelled ones alone for the search and the final check.
        settings: The settings of the pass.
        shared: The leader of each layer, in the order in which they are called.
        loss: Loss of the base model on the first labelled sample.
        moved_loss: The same while an adapter's outputs are moved, which some losses need to differ (`outputs_moved`).
        unlike_losses: Losses of a few samples that are unlike each other: of each, and of the first with each other.
        num_tokens: Tokens of the first labelled sample.
        tokens_per_second: Speed of a forward pass, the best seen.
        unlike: Two samples that are unlike each other, or one if there are no two.
        other_modality: Whether samples have inputs that are no tokens.
    """

    splits: SampleSplits
    settings: PassSettings
    shared: dict[str, str]
    loss: float
    moved_loss: float
    unlike_losses: list[float]
    num_tokens: int
    tokens_per_second: float
    unlike: list[Any]
    other_modality: bool


def probe(job: Job, splits: SampleSplits, *, takes_statistics: bool = True) -> Probe:
    """Learn from a few samples how the loss is made and which layers share an input.

    Args:
        job: The job.
        splits: Its samples.
        takes_statistics: Whether a pass over them follows; False: losses alone are measured.
    """
    shifts = shifts_labels(job.model)
    with job.stage("probe"), job.ranks.together("probe"):
        check_lengths([*splits.statistics, *splits.search, *splits.unseen], job.collate, max_sample_length(job.model))
        labelled = _from_everywhere(job, splits.statistics, shifts)
        if not labelled:
            raise DataError(
                f"None of the {len(splits.statistics)} samples has a label that counts (all are -100). Check how "
                "labels are masked, and that samples are not truncated before their completion begins."
            )
        splits = _with_labels(job, splits, shifts)
        first = job.collate(labelled[:1])
    lockstep = job.lockstep(labelled, "probe")
    compute_loss = _TimedLoss(job.compute_loss, lockstep.in_step)
    with job.stage("probe"), job.ranks.together("probe"), without_checkpointing(job.model):
        layers = {name: target.base_layer for name, target in job.targets.items()}
        losses: list[float] = []
        labelled_head = make_labelled_head(job.model) if takes_loss_alone(job.compute_loss) else None

        def run_forward() -> None:
            watched = contextlib.nullcontext() if labelled_head is None else labelled_head.watched()
            with torch.no_grad(), watched:
                losses.append(compute_loss(job.model, first, None).item())

        with checked_backward(job.scan.targets):
            shared = apart_by_checkpoint(job.model, layers, find_shared_inputs(layers, run_forward))
        with torch.no_grad(), outputs_moved(job.scan.targets):
            moved_loss = compute_loss(job.model, first, None).item()
        with lockstep.alike():
            unlike = choose_unlike(labelled, job.collate, shifts_labels=shifts)
        reduction = find_reduction(
            compute_loss,
            job.model,
            job.collate,
            unlike,
            shifts_labels=shifts,
            declared=job.config.loss_reduction,
            alike=lockstep.alike,
        )
        if labelled_head is not None and not _loss_stays(job, compute_loss, labelled_head, first, losses[0]):
            labelled_head = None
        with lockstep.alike():
            singles = [tell_sequences_apart(job.collate([sample]), longest_labels(job.model)) for sample in unlike]
            pairs = [job.collate([unlike[0], other]) for other in unlike[1:]]
            tokens = [
                read_batch_tokens(b, shifts_labels=shifts, encoder_decoder=is_encoder_decoder(job.model), num_samples=1)
                for b in singles
            ]
        unlike_losses, rows = [], []
        with torch.no_grad():
            for batch in (*singles, *pairs):
                with watched_rows(layers) as given:
                    unlike_losses.append(compute_loss(job.model, batch, None).item())
                rows.append(given)
        any_packed = any(is_packed(job.collate([sample])) for sample in labelled)
    settings = PassSettings(
        batch_size=min(job.batch_size, max(1, len(splits.statistics))),
        token_mask=job.config.token_mask,
        shifts_labels=shifts,
        encoder_decoder=is_encoder_decoder(job.model),
        reduction=reduction,
        labelled_head=labelled_head,
        sequences=followed_sequences(tokens, rows[: len(singles)]),
    )
    job.report.loss_reduction = f"{reduction.kind} ({reduction.reason})"
    job.report.population_size = splits.population_size
    job.report.notes += splits.notes
    if any_packed:
        job.report.notes.append(
            "a sample of the data set is a packed row of several sequences, which count as one sample"
        )
    return Probe(
        splits=splits,
        settings=settings,
        shared=shared,
        loss=losses[0],
        moved_loss=moved_loss,
        unlike_losses=unlike_losses,
        num_tokens=_num_tokens(first),
        tokens_per_second=min(job.ranks.gather(compute_loss.tokens_per_second)),
        unlike=unlike[:2],
        other_modality=read_batch_tokens(first, shifts_labels=shifts).other_modality,
    )


def compare_batch_with_samples(job: Job, found: Probe) -> Probe:
    """Run a few samples as a batch and each alone, and have the pass run them one at a time if that makes a difference.

    Not where it is known to make none: for a language model of text whose head runs on the rows of labels, which was
    compared already, and whose batches say by a mask what is padding.
    """
    settings = found.settings
    if settings.reduction.kind in ("unknown", "batch") or settings.batch_size == 1 or len(found.unlike) < 2:
        return found
    if settings.labelled_head is not None and not found.other_modality and _says_padding(job, found.unlike):
        return found
    layers = {name: target.base_layer for name, target in job.targets.items() if not target.is_routed}
    devices = {name: job.targets[name].device for name in layers}
    with job.stage("statistics"), job.ranks.together("statistics pass"):
        reason = why_not_in_batches(
            job.model,
            found.unlike,
            collate=job.collate,
            compute_loss=job.compute_loss,
            settings=settings,
            make_taps=lambda: SizeTaps(layers, devices=devices),
            lockstep=job.lockstep(found.unlike, "statistics pass"),
        )
    reasons = [text for text in job.ranks.gather(reason) if text is not None]
    if not reasons:
        return found
    if draws_at_random(job.collate, found.unlike):
        reasons = [DRAWS_AT_RANDOM]
    return dataclasses.replace(found, settings=dataclasses.replace(settings, why_single=reasons[0]))


def _says_padding(job: Job, samples: list[Any]) -> bool:
    with job.ranks.together("statistics pass"):
        mask = job.collate(samples).get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2


def _loss_stays(
    job: Job, compute_loss: ComputeLoss, labelled_head: LabelledHead, batch: Mapping[str, Any], loss: float
) -> bool:
    """Tell whether the loss of a sample is the same with the head on the rows of labels."""
    if labelled_head.seen_loss is None or not math.isclose(labelled_head.seen_loss, loss, rel_tol=1e-6):
        return False  # the loss is made elsewhere, or there is more to it
    with torch.no_grad(), labelled_head.rows_of_labels():
        found = compute_loss(job.model, batch, None).item()
    return labelled_head.num_calls == 1 and math.isclose(found, loss, rel_tol=_SAME_LOSS)


class _TimedLoss:
    """A loss that notes how fast it was.

    Attributes:
        tokens_per_second: Of the fastest call.

    Args:
        compute_loss: The loss.
        in_step: Makes a block in which several processes wait for each other, for each call.
    """

    def __init__(self, compute_loss: ComputeLoss, in_step: Callable[[], AbstractContextManager[None]]) -> None:
        self._compute_loss = compute_loss
        self._in_step = in_step
        self.tokens_per_second = 0.0

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
        start = time.perf_counter()
        with self._in_step():
            loss = self._compute_loss(model, batch, num_items)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        speed = _num_tokens(batch) / (time.perf_counter() - start)
        self.tokens_per_second = max(self.tokens_per_second, speed)
        return loss


def _num_tokens(batch: Mapping[str, Any]) -> int:
    masks = read_batch_tokens(batch, shifts_labels=True).masks
    return max((mask.numel() for mask in masks), default=1)


def _with_labels(job: Job, splits: SampleSplits, shifts: bool) -> SampleSplits:
    """Leave samples without a label out of the search and the final check; a search that loses all gets another one."""
    unseen = _labelled(job, splits.unseen, shifts)
    search = _labelled(job, splits.search, shifts)
    statistics = splits.statistics
    if splits.search and not search and unseen:
        search, unseen = unseen[:1], unseen[1:]
    elif splits.search and not search:
        spare = next((k for k in reversed(range(len(statistics))) if _labelled(job, [statistics[k]], shifts)), 0)
        if len(_labelled(job, statistics, shifts, count=2)) < 2:
            raise DataError(
                "One sample alone has a label, and the line search needs one that the statistics did not see. Give "
                "more labelled samples, or a step_size."
            )
        search = [statistics[spare]]
        statistics = [*statistics[:spare], *statistics[spare + 1 :]]
    return dataclasses.replace(splits, statistics=statistics, search=search, unseen=unseen)


def _labelled(job: Job, samples: list[Any], shifts: bool, count: int | None = None) -> list[Any]:
    """Return the first ``count`` samples that have a label, or all of them."""
    return list(itertools.islice((sample for sample in samples if _has_label(job, sample, shifts)), count))


def _from_everywhere(job: Job, samples: list[Any], shifts: bool) -> list[Any]:
    """Return some samples that have a label, in their order: drawn, since the first may be of one class or source."""
    drawn = random.Random(job.seed).sample(range(len(samples)), len(samples))
    labelled = (position for position in drawn if _has_label(job, samples[position], shifts))
    return [samples[position] for position in sorted(itertools.islice(labelled, _PROBED_SAMPLES))]


def _has_label(job: Job, sample: Any, shifts: bool) -> bool:
    return read_batch_tokens(job.collate([sample]), shifts_labels=shifts).num_labelled > 0
