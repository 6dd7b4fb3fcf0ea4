"""The statistics pass: forward and backward over the samples with taps on the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_hf.errors import NonFiniteError, StatisticsError
from lora_da_hf.statistics.batches import Lockstep, batches_by_length, whole_batches
from lora_da_hf.statistics.labelled_head import LabelledHead
from lora_da_hf.statistics.loss_reduction import Collate, ComputeLoss, LossReduction
from lora_da_hf.statistics.model_state import generator_states, restore_generators, without_checkpointing
from lora_da_hf.statistics.pass_state import PassState, PassStore
from lora_da_hf.statistics.sample_weights import weighted_head
from lora_da_hf.statistics.sampled_labels import SampledLabels
from lora_da_hf.statistics.taps import Taps
from lora_da_hf.statistics.token_masks import (
    BatchTokens,
    SingleSamplesNeeded,
    num_rows,
    read_batch_tokens,
    tell_sequences_apart,
)

_HALF_PRECISION_SCALE = 2.0**12
_MOST_IN_FLOAT16 = 2.0**15
_RANDOM_STATE = "random_state"


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What the pass does with each batch.

    Attributes:
        batch_size: Samples in a forward and backward pass.
        token_mask: Which tokens the second moments count.
        shifts_labels: Whether position t predicts label t + 1.
        encoder_decoder: Whether a decoder reads the labels.
        reduction: What the loss of a batch is.
        labelled_head: Runs the head on the rows that predict a label; None: it runs on all.
        head: The module that makes the logits; None: the output embeddings, or the last part of the model.
        sampled_labels: Draws the labels of the output-gradient second moment; None: they are the data's.
        longest_labels: How long the labels of an encoder-decoder may be made to tell its sequences apart.
        why_single: Why samples have to be run one at a time; None: they do not, as far as is known.
    """

    batch_size: int
    token_mask: Literal["attention", "labels"]
    shifts_labels: bool
    encoder_decoder: bool
    reduction: LossReduction
    labelled_head: LabelledHead | None = None
    head: nn.Module | None = None
    sampled_labels: SampledLabels | None = None
    longest_labels: int = 0
    why_single: str | None = None


@dataclass(kw_only=True)
class PassResult:
    """The sums that a pass leaves, and its counts.

    Attributes:
        taps: The sums of each layer.
        num_samples: Samples that have a label.
        num_unlabelled: Samples that have none, and count nowhere.
        batch_size: Samples run together, which is 1 where the loss or the model demands it.
        why_single: Why samples were run one at a time though more were asked for; None: they were not.
        notes: That, and what else a user has to know.
    """

    taps: Taps
    num_samples: int = 0
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
    store: PassStore | None = None,
    lockstep: Lockstep | None = None,
    by_length: bool = True,
) -> PassResult:
    """Run the pass, one sample at a time if the loss or the model cannot be run in batches.

    The result does not depend on the batch size, the padding or the order of the samples: each sample's gradient is
    that of the mean loss over its own labels. A loss of the batch as a whole is the exception.

    Args:
        model: In the state of `prepared_for_pass`.
        samples: This process's share.
        collate: Makes batches.
        compute_loss: The loss.
        settings: How.
        make_taps: Makes the taps, with sums at zero.
        on_samples: Called with the number of samples after each batch, and with a negative one when they start over.
        store: Where the state of the pass is kept, and taken up from; None: nowhere.
        lockstep: Several processes that wait for each other in each pass; None: this one waits for nobody.
        by_length: Whether samples of similar length are put together; else they are in their order.

    Raises:
        NonFiniteError: if a loss is not finite.
        StatisticsError: if even single samples do not fit the settings.
    """
    lockstep = lockstep or Lockstep.of_one()
    batch_size, notes = settings.batch_size, []
    why_single = settings.reduction.reason if settings.reduction.kind == "unknown" else settings.why_single
    if batch_size == 1:
        why_single = None
    if why_single is not None:
        batch_size, notes = 1, [_single_note(why_single)]
    if settings.reduction.kind == "batch":
        notes.append(
            f"the loss is one of {batch_size} samples together and cannot be split: the statistics depend on the batch "
            "size"
        )
    make_batches = batches_by_length if by_length and settings.reduction.kind != "batch" else whole_batches
    resumes = store is not None
    while True:
        with lockstep.alike():
            earlier = store.load() if store is not None and resumes else None
            if earlier is not None:
                batch_size, why_single, notes = (earlier.facts[name] for name in ("batch_size", "why_single", "notes"))
            result = PassResult(taps=make_taps(), batch_size=batch_size, why_single=why_single, notes=notes)
            first = _restore(result, earlier) if earlier is not None else 0
            earlier, resumes = None, False  # its tensors are as large as the sums
        batches = make_batches(samples, batch_size)
        done = sum(map(len, batches[:first]))
        if done:
            on_samples(done)
        try:
            for number, (batch_samples, counts) in enumerate(lockstep.batches(batches[first:]), start=first + 1):
                with lockstep.alike():
                    prepared = _prepare(collate(batch_samples), batch_samples, settings, counts=counts)
                if prepared.counts or lockstep.runs_what_does_not_count:
                    add = _add_batch if settings.sampled_labels is None else _add_batch_twice
                    add(model, prepared, compute_loss, settings, result.taps, lockstep)
                if counts:
                    _count_batch(prepared.tokens, result)
                    done += len(batch_samples)
                    on_samples(len(batch_samples))
                if store is not None and number % store.every == 0:
                    with lockstep.alike():
                        store.save(_state(result, number))
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
            if store is not None:
                with lockstep.alike():  # before any process writes the first of the new ones
                    store.clear()
            continue
        return result


def _single_note(reason: str) -> str:
    return f"run one sample at a time: {reason}"


def _state(result: PassResult, batches_done: int) -> PassState:
    names = ("num_samples", "num_unlabelled", "batch_size", "why_single", "notes")
    facts = {name: getattr(result, name) for name in names}
    counts = {"batches_done": batches_done, "counts": result.taps.counts(), "saw_float16": result.taps.saw_float16}
    tensors = {**result.taps.sums(), _RANDOM_STATE: torch.get_rng_state()}
    return PassState(tensors=tensors, facts={**facts, **counts, "generators": generator_states()})


def _restore(result: PassResult, state: PassState) -> int:
    """Put the sums and counts of an earlier pass in a new one, and return how many batches are in them."""
    result.taps.restore(state.tensors, state.facts["counts"])
    result.taps.saw_float16 = state.facts["saw_float16"]
    result.num_samples, result.num_unlabelled = state.facts["num_samples"], state.facts["num_unlabelled"]
    torch.set_rng_state(state.tensors[_RANDOM_STATE])
    restore_generators(state.facts["generators"])
    return state.facts["batches_done"]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A batch, its samples and tokens, what each sample weighs, and whether it counts."""

    batch: Mapping[str, Any]
    samples: Sequence[Any]
    tokens: BatchTokens
    weights: Tensor | float
    counts: bool


def _prepare(batch: Mapping[str, Any], samples: Sequence[Any], settings: PassSettings, *, counts: bool) -> _Prepared:
    num_samples = len(samples)
    batch = tell_sequences_apart(batch, settings.longest_labels)
    if num_rows(batch) % num_samples:
        raise SingleSamplesNeeded(f"the collator makes {num_rows(batch)} rows of {num_samples} samples")
    tokens = read_batch_tokens(
        batch,
        shifts_labels=settings.shifts_labels,
        encoder_decoder=settings.encoder_decoder,
        token_mask=settings.token_mask,
        num_samples=num_samples,
    )
    if not counts or tokens.num_labelled == 0:
        return _Prepared(batch=batch, samples=samples, tokens=tokens, weights=1.0, counts=False)
    weights = settings.reduction.sample_weights(tokens)
    if weights is None:
        raise SingleSamplesNeeded("the labels of each sample cannot be counted")
    return _Prepared(batch=batch, samples=samples, tokens=tokens, weights=weights, counts=True)


def _count_batch(tokens: BatchTokens, result: PassResult) -> None:
    result.num_samples += tokens.num_labelled
    result.num_unlabelled += tokens.num_samples - tokens.num_labelled


def _add_batch_twice(
    model: nn.Module,
    prepared: _Prepared,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    taps: Taps,
    lockstep: Lockstep,
) -> None:
    """Add a batch with its own labels to the gradient, and with drawn ones to the output-gradient second moment."""
    assert settings.sampled_labels is not None
    with lockstep.in_step():
        logits = settings.sampled_labels.logits(model, prepared.batch)
    with lockstep.alike():
        drawn = replace(prepared, batch=settings.sampled_labels.draw(prepared.batch, prepared.samples, logits))
    del logits
    for batch, is_drawn in ((prepared, False), (drawn, True)):
        taps.sums_gradients, taps.sums_squares = not is_drawn, is_drawn
        _add_batch(model, batch, compute_loss, settings, taps, lockstep)


def _add_batch(
    model: nn.Module,
    prepared: _Prepared,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    taps: Taps,
    lockstep: Lockstep,
) -> None:
    weights = prepared.weights
    taps.tokens, taps.muted = prepared.tokens, not prepared.counts
    by_sample = weights if isinstance(weights, Tensor) else None
    with taps, weighted_head(model, settings.labelled_head, by_sample, settings.head) as head:
        with lockstep.in_step():
            loss = settings.reduction.loss(compute_loss, model, prepared.batch)
            # gradients in float16, whose range is too small for them as they are
            taps.gradient_scale = _HALF_PRECISION_SCALE if taps.saw_float16 else 1.0
            weight = 1.0 if isinstance(weights, Tensor) else weights
            if loss.dtype == torch.float16:  # which holds no gradient above 65504 either
                taps.gradient_scale = min(taps.gradient_scale, _MOST_IN_FLOAT16 / weight)
            loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # the weight is not rounded
            if loss.requires_grad:
                (loss * (weight * taps.gradient_scale)).backward()
        with lockstep.alike():  # after the backward pass, which the others are in too
            if prepared.counts:
                check_loss(loss)
                taps.check()
                if head is not None:
                    head.check()
    taps.tokens = None


def check_loss(loss: Tensor) -> float:
    """Return the loss as a number.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    value = float(loss.detach().item())
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(
            f"The loss of a batch is {value}. Check the samples (labels inside the vocabulary, at least one label) "
            "and the model's dtype: float16 overflows where bfloat16 does not."
        )
    return value


def _tells_samples_apart(samples: Sequence[Any], collate: Collate, settings: PassSettings) -> bool:
    """Tell whether two samples have rows of their own in a batch, and labels where the loss is divided by those."""
    batch = collate(samples[:2])
    counts = read_batch_tokens(batch, shifts_labels=settings.shifts_labels, num_samples=2).label_counts
    by_label = settings.reduction.kind in ("sum", "token_mean")
    return num_rows(batch) % 2 == 0 and not (by_label and counts is None)


def evaluate_loss(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    batch_size: int,
    lockstep: Lockstep | None = None,
) -> tuple[float, float]:
    """Sum the loss over samples without gradients, for the arguments of `collect`.

    Returns:
        The summed loss, and the number of labels (or of samples, for a loss that is not a mean over labels) to divide
        it by. Not finite if a loss is not: a step that is too long does that.
    """
    lockstep = lockstep or Lockstep.of_one()
    total, count = 0.0, 0.0
    kind = settings.reduction.kind
    single = kind == "unknown" or settings.why_single is not None
    if batch_size > 1 and not single and kind != "batch":
        with lockstep.alike():  # of all processes, whatever share of the samples they have
            single = len(samples) > 1 and not _tells_samples_apart(samples, collate, settings)
    make_batches = whole_batches if kind == "batch" else batches_by_length
    with torch.no_grad(), without_checkpointing(model):
        for batch_samples, counts in lockstep.batches(make_batches(samples, 1 if single else batch_size)):
            with lockstep.alike():
                batch = collate(batch_samples)
                tokens = read_batch_tokens(batch, shifts_labels=settings.shifts_labels, num_samples=len(batch_samples))
            counts = counts and tokens.num_labelled > 0
            if not counts and not lockstep.runs_what_does_not_count:
                continue
            with lockstep.in_step(), weighted_head(model, settings.labelled_head, None):
                loss = settings.reduction.loss(compute_loss, model, batch).item()
            if counts:
                part, weight = settings.reduction.loss_sum(loss, tokens)
                total, count = total + part, count + weight
    return total, count
