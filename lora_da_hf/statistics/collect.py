"""The statistics pass: forward and backward over the samples with taps on the layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lora_da_hf.errors import NonFiniteError, StatisticsError
from lora_da_hf.statistics.batches import Lockstep, batches_by_length, whole_batches
from lora_da_hf.statistics.labelled_head import LabelledHead
from lora_da_hf.statistics.loss_reduction import ComputeLoss, LossReduction
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.taps import Taps
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, num_rows, read_batch_tokens
from lora_da_hf.statistics.unlike import Collate

_HALF_PRECISION_SCALE = 2.0**12
_MOST_IN_FLOAT16 = 2.0**15


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What the pass does with each batch.

    Attributes:
        token_mask: Which tokens the second moments count.
        shifts_labels: Whether position t predicts label t + 1.
        encoder_decoder: Whether a decoder reads the labels.
        labelled_head: Runs the head on the rows that predict a label; None: it runs on all.
        sequences: Which of the model's sequences the rows of a layer are of (`followed_sequences`).
        why_single: Why samples have to be run one at a time; None: batches will do, as far as is known.
    """

    batch_size: int
    token_mask: Literal["attention", "labels"]
    shifts_labels: bool
    encoder_decoder: bool
    reduction: LossReduction
    labelled_head: LabelledHead | None = None
    sequences: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    why_single: str | None = None

    def labelled_rows(self) -> AbstractContextManager[None]:
        """Run the head on the rows of labels inside, if the pass does."""
        return contextlib.nullcontext() if self.labelled_head is None else self.labelled_head.rows_of_labels()


@dataclass(kw_only=True)
class PassResult:
    """The sums that a pass leaves, and its counts.

    Attributes:
        num_samples: Samples that have a label.
        num_items: Labels, or samples, that the training objective averages over.
        num_unlabelled: Samples that have none, and count nowhere.
        batch_size: Samples run together, which is 1 where the loss or the model demands it.
        why_single: Why samples were run one at a time though more were asked for; None: they were not.
        notes: That, and what else a user has to know.
    """

    taps: Taps
    num_samples: int = 0
    num_items: int = 0
    num_unlabelled: int = 0
    batch_size: int = 1
    why_single: str | None = None
    notes: list[str] = field(default_factory=list)


def collect(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    make_taps: Callable[[], Taps],
    on_samples: Callable[[int], None],
    lockstep: Lockstep | None = None,
    by_length: bool = True,
) -> PassResult:
    """Run the pass on this process's samples, one at a time if the loss or the model cannot be run in batches.

    The sums are those of a loss that is summed over labels or samples, whichever the training objective averages over,
    so they depend neither on the batch size nor on the order. A loss of the batch as a whole is the exception.
    The model is in the state of `prepared_for_pass`. ``on_samples`` gets the number of samples after each batch, and a
    negative one when they start over.

    Raises:
        NonFiniteError: if a loss is not finite.
        StatisticsError: if even single samples do not fit the settings.
    """
    lockstep = lockstep or Lockstep.of_one()
    batch_size, why_single, notes = settings.batch_size, None, list[str]()
    if batch_size > 1:
        why_single = settings.reduction.reason if settings.reduction.kind == "unknown" else settings.why_single
    if why_single is not None:
        batch_size, notes = 1, [_single_note(why_single)]
    if settings.reduction.kind == "batch":
        notes.append(
            f"the loss is one of {batch_size} samples together and cannot be split: the statistics depend on the batch "
            "size"
        )
    while True:
        result = PassResult(taps=make_taps(), batch_size=batch_size, why_single=why_single, notes=notes)
        result.taps.sequences = settings.sequences
        done = 0
        try:
            for read in _read_batches(samples, batch_size, collate, settings, lockstep, by_length=by_length):
                if read.counts or lockstep.runs_what_does_not_count:
                    _add_batch(model, read, compute_loss, settings, result.taps, lockstep)
                if not read.is_filler:
                    tokens = read.tokens
                    result.num_samples += tokens.num_labelled
                    result.num_items += read.num_items
                    result.num_unlabelled += tokens.num_samples - tokens.num_labelled
                    done += tokens.num_samples
                    on_samples(tokens.num_samples)
        except SingleSamplesNeeded as reason:
            if batch_size == 1:
                raise StatisticsError(
                    f"The statistics cannot be taken even one sample at a time: {reason}. If the collator pads single "
                    'samples, turn that off; with token_mask="labels" try "attention".'
                ) from reason
            batch_size, why_single = 1, str(reason)
            notes = [*notes, _single_note(why_single)]
            del result  # before the next sums are there too
            on_samples(-done)
            continue
        return result


def _single_note(reason: str) -> str:
    return f"run one sample at a time: {reason}"


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A batch, its tokens, how many items its loss averages over, and whether it counts."""

    batch: Mapping[str, Any]
    tokens: BatchTokens
    num_items: int
    counts: bool
    is_filler: bool


def _read_batches(
    samples: Sequence[Any],
    batch_size: int,
    collate: Collate,
    settings: PassSettings,
    lockstep: Lockstep,
    *,
    by_length: bool = True,
) -> Iterator[_Read]:
    make_batches = batches_by_length if by_length and settings.reduction.kind != "batch" else whole_batches
    for chosen, is_own in lockstep.batches(make_batches(samples, batch_size)):
        with lockstep.alike():
            batch = collate(chosen)
            if num_rows(batch) % len(chosen):
                raise SingleSamplesNeeded(f"the collator makes {num_rows(batch)} rows of {len(chosen)} samples")
            tokens = read_batch_tokens(
                batch,
                shifts_labels=settings.shifts_labels,
                encoder_decoder=settings.encoder_decoder,
                token_mask=settings.token_mask,
                num_samples=len(chosen),
            )
            counts = is_own and tokens.num_labelled > 0
            num_items = settings.reduction.num_items(tokens) if counts else 0
        yield _Read(batch=batch, tokens=tokens, num_items=num_items, counts=counts, is_filler=not is_own)


def _add_batch(
    model: nn.Module,
    read: _Read,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    taps: Taps,
    lockstep: Lockstep,
) -> None:
    taps.tokens, taps.muted = read.tokens, not read.counts
    with taps, settings.labelled_rows():
        loss = settings.reduction.loss(compute_loss, model, read.batch)
        loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # the weight is not rounded
        taps.gradient_scale = 1.0
        if taps.saw_float16:  # which has too small a range for the gradients of a mean, and for those of a sum
            scale = min(_HALF_PRECISION_SCALE * read.tokens.num_samples, _MOST_IN_FLOAT16)
            taps.gradient_scale = scale / max(read.num_items, 1)
        if loss.requires_grad:
            (loss * (settings.reduction.weight(read.num_items) * taps.gradient_scale)).backward()
        with lockstep.alike():  # after the backward pass, which the others are in too
            if read.counts:
                value = float(loss.detach().item())
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"The loss of a batch is {value}. Check the samples (labels inside the vocabulary, at least "
                        "one label) and the model's dtype: float16 overflows where bfloat16 does not."
                    )
                taps.check()
    taps.tokens = None


def evaluate_loss(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    batch_size: int,
    lockstep: Lockstep | None = None,
) -> tuple[float, int]:
    """Sum the loss over samples without gradients, for the arguments of `collect`.

    Returns:
        The summed loss, and the number of labels or samples to divide it by. Not finite if a loss is not: a step that
        is too long does that.
    """
    lockstep = lockstep or Lockstep.of_one()
    if settings.reduction.kind == "unknown" or settings.why_single is not None:
        batch_size = 1
    total, num_items = 0.0, 0
    try:
        with torch.no_grad(), without_checkpointing(model):
            for read in _read_batches(samples, batch_size, collate, settings, lockstep):
                if not read.counts and not lockstep.runs_what_does_not_count:
                    continue
                with settings.labelled_rows():
                    loss = settings.reduction.loss(compute_loss, model, read.batch).item()
                if read.counts:
                    total += loss * settings.reduction.weight(read.num_items)
                    num_items += read.num_items
    except SingleSamplesNeeded:
        if batch_size == 1:
            raise
        options: dict[str, Any] = {"collate": collate, "compute_loss": compute_loss, "settings": settings}
        return evaluate_loss(model, samples, **options, batch_size=1, lockstep=lockstep)
    return total, num_items
