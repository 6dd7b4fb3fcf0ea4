"""The statistics pass: forward and backward over the samples with taps on the layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from lora_da_hf.errors import NonFiniteError, StatisticsError
from lora_da_hf.statistics.batches import ALONE, Collate, Lockstep, batches_by_length, whole_batches
from lora_da_hf.statistics.labelled_head import LabelledHead
from lora_da_hf.statistics.loss_reduction import ComputeLoss, LossReduction
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.taps import Taps
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, num_rows, read_batch_tokens

_HALF_PRECISION_SCALE = 2.0**12
_MOST_IN_FLOAT16 = 2.0**15

_TOLERANCE = 1e-2
_TOLERANCE_IN_HALF = 0.1
"""In half precision a batch and its samples apart differ by more. What goes wrong is off by more yet."""


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What the pass does with each batch.

    Attributes:
        shifts_labels: Whether position t predicts label t + 1.
        encoder_decoder: Whether a decoder reads the labels.
        sequences: Which of the model's sequences the rows of a layer are of (`followed_sequences`).
        why_single: Why samples have to be run one at a time; None: batches will do, as far as is known.
        by_length: Whether samples of similar length are batched together, unless the loss is one of the whole batch.
    """

    batch_size: int
    token_mask: Literal["attention", "labels"]
    shifts_labels: bool
    encoder_decoder: bool
    reduction: LossReduction
    labelled_head: LabelledHead | None = None
    sequences: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    why_single: str | None = None
    by_length: bool = True

    def labelled_rows(self) -> AbstractContextManager[None]:
        """Run the head on the rows of labels inside, if the pass does."""
        return contextlib.nullcontext() if self.labelled_head is None else self.labelled_head.rows_of_labels()


@dataclass(kw_only=True)
class PassResult:
    """The sums that a pass leaves, and its counts.

    Attributes:
        batch_size: Samples run together, which is 1 where the loss or the model demands it.
        why_single: Why samples were run one at a time though more were asked for; None: they were not.
        is_split: Whether the loss of a batch was split into those of its samples.
        num_samples: Samples that have a label; the others are ``num_unlabelled``.
        num_items: Labels, or samples, that the training objective averages over.
    """

    taps: Taps
    batch_size: int
    why_single: str | None
    is_split: bool
    num_samples: int = 0
    num_items: int = 0
    num_unlabelled: int = 0

    @property
    def notes(self) -> list[str]:
        """What a user has to know of the pass."""
        notes = [] if self.why_single is None else [f"run one sample at a time: {self.why_single}"]
        if not self.is_split:
            of_batch = f"the loss is one of {self.batch_size} samples together and cannot be split"
            notes.append(f"{of_batch}: the statistics depend on the batch size")
        return notes


def collect(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    make_taps: Callable[[], Taps],
    on_samples: Callable[[int], Any] = lambda _: None,
    lockstep: Lockstep = ALONE,
) -> PassResult:
    """Run the pass on this process's samples, one at a time if the loss or the model cannot be run in batches.

    The sums are those of a loss that is summed over labels or samples, whichever the training objective averages over,
    so they depend neither on the batch size nor on the order. The model is in the state of `prepared_for_pass`.
    ``on_samples`` gets the number of samples after each batch, and a negative one when they start over.

    Raises:
        NonFiniteError: if a loss is not finite.
        StatisticsError: if even single samples do not fit the settings.
    """
    batch_size, why_single = settings.batch_size, None
    if batch_size > 1:
        why_single = settings.reduction.reason if settings.reduction.kind == "unknown" else settings.why_single
    while True:
        batch_size = batch_size if why_single is None else 1
        is_split = settings.reduction.kind != "batch"
        result = PassResult(taps=make_taps(), batch_size=batch_size, why_single=why_single, is_split=is_split)
        result.taps.sequences = settings.sequences
        done = 0
        try:
            for batch, tokens, num_items, is_own in read_batches(samples, batch_size, collate, settings, lockstep):
                if num_items or lockstep.filler is not None:
                    result.taps.tokens = tokens if num_items else None
                    _add_batch(model, batch, num_items, compute_loss, settings, result.taps, lockstep)
                if is_own:
                    result.num_samples += tokens.num_labelled
                    result.num_items += num_items
                    result.num_unlabelled += tokens.num_samples - tokens.num_labelled
                    done += tokens.num_samples
                    on_samples(tokens.num_samples)
            return result
        except SingleSamplesNeeded as reason:
            if batch_size == 1:
                raise StatisticsError(
                    f"The statistics cannot be taken even one sample at a time: {reason}. If the collator pads single "
                    'samples, turn that off; with token_mask="labels" try "attention".'
                ) from reason
            why_single = str(reason)
            del result  # before the next sums are there too
            on_samples(-done)


def read_batches(
    samples: Sequence[Any], batch_size: int, collate: Collate, settings: PassSettings, lockstep: Lockstep
) -> Iterator[tuple[Mapping[str, Any], BatchTokens, int, bool]]:
    """Yield batches, their tokens, how many items the loss averages over, 0 if it does not count, and if it is own."""
    by_length = settings.by_length and settings.reduction.kind != "batch"
    batches = (batches_by_length if by_length else whole_batches)(samples, batch_size)
    for chosen, is_own in lockstep.batches(batches):
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
            num_items = settings.reduction.num_items(tokens) if is_own and tokens.num_labelled else 0
        yield batch, tokens, num_items, is_own


def _add_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_items: int,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    taps: Taps,
    lockstep: Lockstep,
) -> None:
    with taps.attached(), settings.labelled_rows():
        loss = settings.reduction.loss(compute_loss, model, batch)
        loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # the weight is not rounded
        taps.gradient_scale = 1.0
        if torch.float16 in taps.dtypes and taps.tokens:  # its range is too small for gradients of a mean, or of a sum
            scale = min(_HALF_PRECISION_SCALE * taps.tokens.num_samples, _MOST_IN_FLOAT16)
            taps.gradient_scale = scale / num_items
        if loss.requires_grad:
            (loss * (settings.reduction.weight(num_items) * taps.gradient_scale)).backward()
        with lockstep.alike():  # after the backward pass, which the others are in too
            if num_items:
                value = float(loss.detach().item())
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"The loss of a batch is {value}. Check the samples (labels inside the vocabulary, at least "
                        "one label) and the model's dtype: float16 overflows where bfloat16 does not."
                    )
                taps.check()


def why_not_in_batches(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    layers: Mapping[str, nn.Module],
    devices: Mapping[str, torch.device],
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    lockstep: Lockstep,
) -> str | None:
    """Run a few samples as one batch and each alone, and tell why the layers would sum something else, if they would.

    Rows that are taken for the wrong tokens, padding that is taken for tokens, a loss of another kind than it looks
    like, or one that goes around the head: all of them show in the norms of the rows.
    """

    def make_taps() -> Taps:
        widths, alone = dict.fromkeys(layers, (1, 1)), {name: name for name in layers}
        return Taps(layers, widths=widths, shared_inputs=alone, devices=devices, of_norms=True)

    options: dict[str, Any] = {"collate": collate, "compute_loss": compute_loss, "lockstep": lockstep}
    sizes = [replace(settings, batch_size=size, by_length=False) for size in (len(samples), 1)]
    together, apart = (collect(model, samples, settings=size, make_taps=make_taps, **options) for size in sizes)
    if together.why_single is not None:
        return together.why_single
    in_half = together.taps.dtypes & {torch.float16, torch.bfloat16}
    for name, expected in apart.taps.taps.items():
        found = together.taps.taps[name]
        if found.num_tokens != expected.num_tokens:
            return (
                f"together, samples have {found.num_tokens} rows that count in {name}, and {expected.num_tokens} apart"
            )
        for which in ("input_moment", "squares", "weight_grad"):
            summed, right = getattr(found, which).item(), getattr(expected, which).item()
            off = abs(summed - right) / max(right, 1e-30)
            if not off <= (_TOLERANCE_IN_HALF if in_half else _TOLERANCE):
                return f"what a batch sums in {name} is {off:.0%} off the sum over its samples"
    return None


def evaluate_losses(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    lockstep: Lockstep = ALONE,
) -> list[tuple[float, int]]:
    """Return the loss of each batch, summed and without gradients, and the number of items to divide it by.

    The batches are the same at each call. A loss is not finite if the step is too long.
    """
    is_single = settings.reduction.kind == "unknown" or settings.why_single is not None
    batch_size = 1 if is_single else settings.batch_size
    losses: list[tuple[float, int]] = []
    try:
        with torch.no_grad(), without_checkpointing(model):
            for batch, _, count, _ in read_batches(samples, batch_size, collate, settings, lockstep):
                if not count and lockstep.filler is None:
                    continue
                with settings.labelled_rows():
                    loss = settings.reduction.loss(compute_loss, model, batch).item()
                if count:
                    losses.append((loss * settings.reduction.weight(count), count))
    except SingleSamplesNeeded as reason:
        if batch_size == 1:
            raise
        options: dict[str, Any] = {"collate": collate, "compute_loss": compute_loss, "lockstep": lockstep}
        return evaluate_losses(model, samples, settings=replace(settings, why_single=str(reason)), **options)
    return losses
