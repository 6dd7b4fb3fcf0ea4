"""What a few samples tell before the pass: how the loss is made, and which layers share an input."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.adapters.trial import checked_backward, outputs_moved
from lora_da_hf.distributed.parameters import is_partitioned
from lora_da_hf.errors import DataError
from lora_da_hf.losses import (
    LabelledHead,
    generates,
    is_encoder_decoder,
    make_labelled_head,
    max_sample_length,
    shifts_labels,
)
from lora_da_hf.pipeline.job import Job
from lora_da_hf.samples import SampleSplits
from lora_da_hf.statistics.batches import check_lengths, choose_unlike, draws_at_random
from lora_da_hf.statistics.collect import PassSettings, why_not_in_batches
from lora_da_hf.statistics.loss_reduction import LossReduction, UnlikeSamples, find_reduction
from lora_da_hf.statistics.model_state import apart_by_checkpoint, without_checkpointing
from lora_da_hf.statistics.taps import find_shared_inputs, followed_sequences, watched_rows
from lora_da_hf.statistics.token_masks import lengthened, read_batch_tokens

LOSS = "loss"
_PROBED_SAMPLES = 64
"""Samples with a label among which the few that are run are chosen."""
_SAME_LOSS = 1e-3
_DRAWS_AT_RANDOM = "the collator draws at random, so samples together and apart cannot be compared"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a few samples tell about the job.

    Attributes:
        splits: The samples, with labelled ones alone for the search and the final check.
        shared: The leader of each layer, in the order in which they are called.
        losses: Of a sample at the base; and of unlike ones, which a loss may weigh unlike, while outputs are moved
            (`outputs_moved`), since some losses are the same at the base whatever they ask for.
        unlike: Two samples that are unlike each other, or the only one.
        has_text_alone: Whether it is a language model of text, whose head runs on the rows of labels.
    """

    splits: SampleSplits
    settings: PassSettings
    shared: dict[str, str]
    losses: dict[str, float]
    unlike: list[Any]
    has_text_alone: bool
    notes: tuple[str, ...]

    @property
    def reduction(self) -> str:
        """What the loss of a batch is, and where that is known from."""
        return f"{self.settings.reduction.kind} ({self.settings.reduction.reason})"


def run_probe(job: Job, splits: SampleSplits) -> Probe:
    """Learn from a few samples how the loss is made and which layers share an input."""
    shifts = shifts_labels(job.model)
    samples = [*splits.statistics, *splits.search, *splits.unseen, *splits.heads]
    check_lengths(samples, job.collate, max_sample_length(job.model))
    labelled = _from_everywhere(job, splits.statistics, shifts)
    if not labelled:
        raise DataError(
            f"None of the {len(splits.statistics)} samples has a label that counts (all are -100). Check how labels "
            "are masked, and that samples are not truncated before their completion begins."
        )
    search, unseen = ([s for s in part if _has_label(job, s, shifts)] for part in (splits.search, splits.unseen))
    if splits.search and not search:
        raise DataError(
            f"None of the {len(splits.search)} samples for the line search has a label. Give more labelled samples, or "
            "a step_size."
        )
    splits = dataclasses.replace(splits, search=search, unseen=unseen)
    with without_checkpointing(job.model):
        unlike = choose_unlike(labelled, job.collate, shifts_labels=shifts)
        first = job.collate(unlike[:1])
        losses, shared, labelled_head = _run_first(job, first)
        with outputs_moved(job.scan.targets):  # at the base, what KTO takes of the whole batch is zero
            reduction, unlike_losses, sequences = _run_unlike(job, unlike, shifts)
    settings = PassSettings(
        model=job.model,
        collate=job.collate,
        compute_loss=job.compute_loss,
        batch_size=min(job.batch_size, max(1, len(splits.statistics))),
        token_mask=job.config.token_mask,
        shifts_labels=shifts,
        encoder_decoder=is_encoder_decoder(job.model),
        reduction=reduction,
        around_loss=contextlib.nullcontext if labelled_head is None else labelled_head.rows_of_labels,
        sequences=sequences,
    )
    if job.processes.count > 1 and is_partitioned(job.model):
        settings = dataclasses.replace(settings, gather=job.processes.gather, filler=unlike[0])
    return Probe(
        splits=splits,
        settings=settings.one_at_a_time(reduction.reason) if reduction.kind == "unknown" else settings,
        shared=shared,
        losses=losses | unlike_losses,
        unlike=unlike[:2],
        has_text_alone=labelled_head is not None and not read_batch_tokens(first, shifts_labels=shifts).other_modality,
        notes=splits.notes,
    )


def _run_first(job: Job, first: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str], LabelledHead | None]:
    """Run the first sample: its losses, the leader of each layer, and what runs the head on the rows of labels."""
    layers = {name: target.base_layer for name, target in job.targets.items()}
    head = make_labelled_head(job.model, job.compute_loss)
    losses: dict[str, float] = {}

    def run_forward() -> None:
        watched = contextlib.nullcontext() if head is None else head.watched()
        with torch.no_grad(), watched:
            losses[LOSS] = job.compute_loss(job.model, first, None).item()

    with checked_backward(job.scan.targets):
        shared = apart_by_checkpoint(job.model, layers, find_shared_inputs(layers, run_forward))
    return losses, shared, head if head is not None and _loss_stays(job, head, first, losses[LOSS]) else None


def _run_unlike(
    job: Job, unlike: list[Any], shifts: bool
) -> tuple[LossReduction, dict[str, float], Mapping[str, frozenset[int]]]:
    """Run samples that are unlike each other, alone and in pairs: what the loss is, and the sequences of each layer."""
    layers, decodes = {name: target.base_layer for name, target in job.targets.items()}, is_encoder_decoder(job.model)
    rows: dict[int, Any] = {}

    def compute_watched(model: nn.Module, batch: Mapping[str, Any], items: Tensor | None) -> Tensor:
        with watched_rows(layers) as rows[id(batch)]:
            return job.compute_loss(model, batch, items)

    samples = UnlikeSamples(unlike, job.collate, compute_watched, job.model, shifts_labels=shifts)
    reduction = find_reduction(samples, declared=job.config.loss_reduction)
    if reduction.kind == "unknown" and len(unlike) > 1 and draws_at_random(job.collate, unlike[:1]):
        reduction = LossReduction(kind="unknown", reason=_DRAWS_AT_RANDOM)
    reduction, singles = job.processes.gather(reduction)[0], samples.singles
    options: dict[str, Any] = {"shifts_labels": shifts, "encoder_decoder": decodes, "num_samples": 1}
    if generates(job.model) if decodes else read_batch_tokens(singles[0], **options).other_modality:
        singles = [*singles, lengthened(singles[0], max_sample_length(job.model), decoder=decodes)]
    items = 1 if reduction.kind == "sum" else None
    losses = {
        f"{LOSS} of unlike samples {number}": samples.loss(batch, items)
        for number, batch in enumerate((*singles, *samples.pairs))
    }
    tokens = [read_batch_tokens(batch, **options) for batch in singles]
    return reduction, losses, followed_sequences(tokens, [rows[id(batch)] for batch in singles])


def compare_batch_with_samples(job: Job, probe: Probe) -> Probe:
    """Run a few samples as a batch and each alone, and have the pass run them one at a time if that makes a difference.

    Not where it is known to make none: for a language model of text whose head runs on the rows of labels, which was
    compared already, and whose batches say by a mask what is padding.
    """
    settings = probe.settings
    if settings.reduction.kind == "batch" or settings.batch_size == 1 or len(probe.unlike) < 2:
        return probe
    mask = job.collate(probe.unlike).get("attention_mask")
    if probe.has_text_alone and isinstance(mask, Tensor) and mask.dim() == 2:
        return probe
    layers = {name: target.base_layer for name, target in job.targets.items() if not target.is_routed}
    devices = {name: job.targets[name].device for name in layers}
    reason = why_not_in_batches(probe.unlike, settings, layers=layers, devices=devices)
    reasons = [text for text in job.processes.gather(reason) if text is not None]
    if not reasons:
        return probe
    if draws_at_random(job.collate, probe.unlike):
        reasons = [_DRAWS_AT_RANDOM]
    return dataclasses.replace(probe, settings=settings.one_at_a_time(reasons[0]))


def _loss_stays(job: Job, labelled_head: LabelledHead, batch: Mapping[str, Any], loss: float) -> bool:
    """Tell whether the loss of a sample is the same with the head on the rows of labels."""
    if labelled_head.seen_loss is None or not math.isclose(labelled_head.seen_loss, loss, rel_tol=1e-6):
        return False  # the loss is made elsewhere, or there is more to it
    with torch.no_grad(), labelled_head.rows_of_labels():
        found = job.compute_loss(job.model, batch, None).item()
    return labelled_head.num_calls == 1 and math.isclose(found, loss, rel_tol=_SAME_LOSS)


def _from_everywhere(job: Job, samples: list[Any], shifts: bool) -> list[Any]:
    """Return some samples that have a label, in their order: drawn, since the first may be of one class or source."""
    drawn = random.Random(job.seed).sample(range(len(samples)), len(samples))
    labelled = (position for position in drawn if _has_label(job, samples[position], shifts))
    return [samples[position] for position in sorted(itertools.islice(labelled, _PROBED_SAMPLES))]


def _has_label(job: Job, sample: Any, shifts: bool) -> bool:
    return read_batch_tokens(job.collate([sample]), shifts_labels=shifts).num_labelled > 0
