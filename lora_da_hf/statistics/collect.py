"""The statistics pass: forward and backward over the samples with taps on the layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lora_da_hf.errors import NonFiniteError, StatisticsError
from lora_da_hf.statistics.batches import Collate, batches_by_length, whole_batches
from lora_da_hf.statistics.loss_reduction import ComputeLoss, LossReduction
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.taps import Taps
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, num_rows, read_batch_tokens

_HALF_PRECISION_SCALE = 2.0**12
_MOST_IN_FLOAT16 = 2.0**15

_TOLERANCE = 1e-2
_TOLERANCE_IN_HALF = 0.1
"""In half precision a batch and its samples apart differ by more. What goes wrong is off by more yet."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch that is run.

    Attributes:
        tokens: None, if it only fills up for processes that have more batches.
        num_items: Labels, or samples, that the training objective averages over; 0 if the batch does not count.
        weight: What its loss is multiplied by to become a sum over the items.
        is_run: Whether it is run at all.
    """

    inputs: Mapping[str, Any]
    tokens: BatchTokens | None
    num_items: int
    weight: float
    is_run: bool


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """The model and its loss, and how samples are run in batches.

    Attributes:
        batch_size: Samples run together, which is 1 where the loss or the model demands it.
        shifts_labels: Whether position t predicts label t + 1.
        encoder_decoder: Whether a decoder reads the labels.
        around_loss: Makes what each pass is run in, such as `LabelledHead.rows_of_labels`.
        sequences: Which of the model's sequences the rows of a layer are of (`followed_sequences`).
        why_single: Why samples are run one at a time though more were asked for; None: they are not.
        by_length: Whether samples of similar length are batched together, unless the loss is one of the whole batch.
        gather: Returns what each process gives it, if parameters in parts demand that all run as many batches.
        filler: A sample to run then where a process has none left.
    """

    model: nn.Module
    collate: Collate
    compute_loss: ComputeLoss
    batch_size: int
    token_mask: Literal["attention", "labels"]
    shifts_labels: bool
    encoder_decoder: bool
    reduction: LossReduction
    around_loss: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    sequences: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    why_single: str | None = None
    by_length: bool = True
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    filler: Any = None

    def one_at_a_time(self, why: str | None = None) -> PassSettings:
        """Return the settings for single samples, and why if more were asked for."""
        return self if self.batch_size == 1 else replace(self, batch_size=1, why_single=why)

    def loss(self, batch: Batch) -> Tensor:
        """Run the model, and return the loss of a batch: summed over labels if it can be, else its own mean."""
        with self.around_loss():
            return self.reduction.loss(self.compute_loss, self.model, batch.inputs)

    @property
    def notes(self) -> list[str]:
        """What a user has to know of the pass."""
        notes = [] if self.why_single is None else [f"run one sample at a time: {self.why_single}"]
        if self.reduction.kind == "unknown":
            notes.append("each sample weighs the same, however many labels it has: loss_reduction can say otherwise")
        if self.reduction.kind == "batch":
            of_batch = f"the loss is one of {self.batch_size} samples together and cannot be split"
            notes.append(f"{of_batch}: the statistics depend on the batch size")
        return notes

    def batches(self, samples: Sequence[Any]) -> Iterator[Batch]:
        """Make the batches of this process, and then those that fill up until every process is done.

        Raises:
            SingleSamplesNeeded: if samples cannot be run together.
        """
        by_length = self.by_length and self.reduction.kind != "batch"
        batches = (batches_by_length if by_length else whole_batches)(samples, self.batch_size)
        how: dict[str, Any] = {n: getattr(self, n) for n in ("shifts_labels", "encoder_decoder", "token_mask")}
        for number in range(max(self.gather(len(batches)))):
            is_own = number < len(batches)
            chosen = batches[number] if is_own else [self.filler]
            with self.alike():
                inputs = self.collate(chosen)
                if num_rows(inputs) % len(chosen):
                    raise SingleSamplesNeeded(f"the collator makes {num_rows(inputs)} rows of {len(chosen)} samples")
                tokens = read_batch_tokens(inputs, num_samples=len(chosen), **how)
                num_items = self.reduction.num_items(tokens) if is_own and tokens.num_labelled else 0
            yield Batch(
                inputs=inputs,
                tokens=tokens if is_own else None,
                num_items=num_items,
                weight=self.reduction.weight(num_items) if num_items else 0.0,
                is_run=num_items > 0 or self.filler is not None,
            )

    @contextlib.contextmanager
    def alike(self) -> Generator[None]:
        """Have all processes run single samples if one of them needs that, at the same batch."""
        reason: str | None = None
        try:
            yield
        except SingleSamplesNeeded as error:
            reason = str(error)
        reasons = [text for text in self.gather(reason) if text is not None]
        if reasons:
            raise SingleSamplesNeeded(reasons[0])


@dataclass(frozen=True)
class PassCounts:
    """What a pass counted.

    Attributes:
        num_samples: Samples that have a label; the others are ``num_unlabelled``.
        num_items: Labels, or samples, that the training objective averages over.
    """

    num_samples: int
    num_items: int
    num_unlabelled: int
    batch_size: int
    notes: tuple[str, ...]


def in_batches(settings: PassSettings, run: Callable[[PassSettings], T]) -> T:
    """Run something, and again one sample at a time if samples turn out not to do together.

    Raises:
        StatisticsError: if even single samples do not fit the settings.
    """
    try:
        return run(settings)
    except SingleSamplesNeeded as error:
        if settings.batch_size == 1:
            raise StatisticsError(
                f"The statistics cannot be taken even one sample at a time: {error}. If the collator pads single "
                'samples, turn that off; with token_mask="labels" try "attention".'
            ) from error
        reason = str(error)
    return in_batches(settings.one_at_a_time(reason), run)  # by now what the first try summed is released


def collect(
    samples: Sequence[Any],
    settings: PassSettings,
    make_taps: Callable[[], Taps],
    on_samples: Callable[[int], Any] = lambda _: None,
) -> tuple[Taps, PassCounts]:
    """Run the pass on this process's samples.

    The sums are those of a loss that is summed over labels or samples, whichever the training objective averages over,
    so they depend neither on the batch size nor on the order. The model is in the state of `prepared_for_pass`.
    ``on_samples`` gets the number of samples after each batch, and a negative one if they start over.

    Raises:
        NonFiniteError: if a loss is not finite.
        SingleSamplesNeeded: if samples cannot be run together.
    """
    taps, num_samples, num_items, num_unlabelled = make_taps(), 0, 0, 0
    taps.sequences = settings.sequences
    try:
        for batch in settings.batches(samples):
            if batch.is_run:
                _add_batch(batch, settings, taps)
            if batch.tokens is not None:
                num_samples += batch.tokens.num_labelled
                num_items += batch.num_items
                num_unlabelled += batch.tokens.num_samples - batch.tokens.num_labelled
                on_samples(batch.tokens.num_samples)
    except SingleSamplesNeeded:
        on_samples(-num_samples - num_unlabelled)
        raise
    taps.finish()
    return taps, PassCounts(num_samples, num_items, num_unlabelled, settings.batch_size, tuple(settings.notes))


def _add_batch(batch: Batch, settings: PassSettings, taps: Taps) -> None:
    tokens = taps.tokens = batch.tokens if batch.num_items else None
    own = [name for name in batch.inputs if name.endswith("attention_mask") and name != "decoder_attention_mask"]
    has_masks = tokens is None or (tokens.masks and len(own) < 2)
    with taps.attached(), contextlib.nullcontext() if has_masks else taps.masks_given_to(settings.model):
        loss = settings.loss(batch)
        loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # the weight is not rounded
        taps.gradient_scale = 1.0
        if torch.float16 in taps.dtypes and taps.tokens:  # its range is too small for gradients of a mean, or of a sum
            scale = min(_HALF_PRECISION_SCALE * taps.tokens.num_samples, _MOST_IN_FLOAT16)
            taps.gradient_scale = scale / batch.num_items
        if loss.requires_grad:
            (loss * (batch.weight * taps.gradient_scale)).backward()
        with settings.alike():  # after the backward pass, which the others are in too
            value = loss.item()
            if batch.num_items and not math.isfinite(value):
                raise NonFiniteError(
                    f"The loss of a batch is {value}. Check the samples (labels inside the vocabulary, at least one "
                    "label) and the model's dtype: float16 overflows where bfloat16 does not."
                )
            taps.check()


def why_not_in_batches(
    samples: Sequence[Any],
    settings: PassSettings,
    *,
    layers: Mapping[str, nn.Module],
    devices: Mapping[str, torch.device],
) -> str | None:
    """Run a few samples as one batch and each alone, and tell why the layers would sum something else, if they would.

    Rows that are taken for the wrong tokens, padding that is taken for tokens, a loss of another kind than it looks
    like, or one that goes around the head: all of them show in the norms of the rows.
    """

    def make_taps() -> Taps:
        widths, alone = dict.fromkeys(layers, (1, 1)), {name: name for name in layers}
        return Taps(layers, widths=widths, shared_inputs=alone, devices=devices, of_norms=True)

    settings = replace(settings, by_length=False)
    try:
        together, _ = collect(samples, replace(settings, batch_size=len(samples)), make_taps)
    except SingleSamplesNeeded as reason:
        return str(reason)
    apart, _ = in_batches(settings.one_at_a_time(), lambda single: collect(samples, single, make_taps))
    in_half = together.dtypes & {torch.float16, torch.bfloat16}
    for name, expected in apart.taps.items():
        tap, numbers = together.taps[name], (together.taps[name].num_tokens, expected.num_tokens)
        if numbers[0] != numbers[1]:
            return f"together, samples have {numbers[0]} rows that count in {name}, and {numbers[1]} apart"
        pairs = ((t.input_moment.entries, t.squares, t.weight_grad) for t in (tap, expected))
        for summed, right in zip(*(map(Tensor.item, sums) for sums in pairs), strict=True):
            off = abs(summed - right) / max(right, 1e-30)
            if not off <= (_TOLERANCE_IN_HALF if in_half else _TOLERANCE):
                return f"what a batch sums in {name} is {off:.0%} off the sum over its samples"
    return None


def evaluate_losses(samples: Sequence[Any], settings: PassSettings) -> list[tuple[float, int]]:
    """Return the loss of each batch, summed and without gradients, and the number of items to divide it by.

    The batches are the same at each call. A loss is not finite if the step is too long.

    Raises:
        SingleSamplesNeeded: if samples cannot be run together.
    """
    with torch.no_grad(), without_checkpointing(settings.model):
        runs = ((batch, settings.loss(batch).item()) for batch in settings.batches(samples) if batch.is_run)
        return [(loss * batch.weight, batch.num_items) for batch, loss in runs if batch.num_items]
