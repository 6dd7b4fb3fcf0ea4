"""The statistics pass: forward and backward over the samples with taps on the layers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_hf.errors import DataError, NonFiniteError, StatisticsError
from lora_da_hf.statistics.losses import Collate, ComputeLoss, LossReduction
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.taps import SampleWeights, Taps
from lora_da_hf.statistics.token_masks import SingleSamplesNeeded, num_rows, read_batch_tokens

_HALF_PRECISION_SCALE = 2.0**12
_LITTLE_PADDING = 16


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What the pass does with each batch.

    Attributes:
        batch_size: Samples in a forward and backward pass.
        token_mask: Which tokens the second moments count.
        shifts_labels: Whether position t predicts label t + 1.
        encoder_decoder: Whether a decoder reads the labels.
        reduction: What the loss of a batch is.
    """

    batch_size: int
    token_mask: Literal["attention", "labels"]
    shifts_labels: bool
    encoder_decoder: bool
    reduction: LossReduction


@dataclass(kw_only=True)
class PassResult:
    """The sums that a pass leaves, and its counts.

    Attributes:
        taps: The sums of each layer.
        num_samples: Samples that have a label.
        num_unlabelled: Samples that have none, and count nowhere.
        batch_size: Samples run together, which is 1 where the loss or the model demands it.
        notes: Why, if so.
        sample_digests: SHA-256 of each sample's tensors, in the order that the samples were given.
    """

    taps: Taps
    num_samples: int = 0
    num_unlabelled: int = 0
    batch_size: int = 1
    notes: list[str] = field(default_factory=list)
    sample_digests: list[str] = field(default_factory=list)


def collect(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    make_taps: Callable[[], Taps],
    on_samples: Callable[[int], None],
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

    Raises:
        NonFiniteError: if a loss is not finite.
        StatisticsError: if even single samples do not fit the settings.
    """
    batch_size, notes = settings.batch_size, []
    if settings.reduction.kind == "unknown" and batch_size > 1:
        batch_size = 1
        notes.append(f"run one sample at a time: {settings.reduction.reason}")
    if settings.reduction.kind == "batch":
        notes.append(
            f"the loss is one of {batch_size} samples together and cannot be split: the statistics depend on the batch "
            "size"
        )
    make_batches = _whole_batches if settings.reduction.kind == "batch" else _batches
    while True:
        result = PassResult(taps=make_taps(), batch_size=batch_size, notes=notes)
        done = 0
        try:
            for batch_samples in make_batches(samples, batch_size):
                _add_batch(model, collate(batch_samples), len(batch_samples), compute_loss, settings, result)
                done += len(batch_samples)
                on_samples(len(batch_samples))
        except SingleSamplesNeeded as reason:
            if batch_size == 1:
                raise StatisticsError(
                    f"The statistics cannot be taken even one sample at a time: {reason}. If the collator pads single "
                    'samples, turn that off; with token_mask="labels" try "attention".'
                ) from reason
            batch_size, notes = 1, [*notes, f"run one sample at a time: {reason}"]
            on_samples(-done)
            continue
        result.sample_digests = [digest_sample(collate([sample])) for sample in samples]
        return result


def _batches(samples: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batch samples of similar length together: it saves padding, and the order does not matter.

    No sample is padded by more than a quarter of its length, or 16 tokens, so a batch may be smaller than asked.
    """
    batches: list[list[Any]] = []
    for sample in sorted(samples, key=sample_length, reverse=True):
        last = batches[-1] if batches else []
        length = sample_length(sample)
        if last and len(last) < batch_size and sample_length(last[0]) <= length + max(length // 4, _LITTLE_PADDING):
            last.append(sample)
        else:
            batches.append([sample])
    return batches


def _whole_batches(samples: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batch samples for a loss that needs them together: none is left alone."""
    number = -(-len(samples) // batch_size)
    ends = [len(samples) * k // number for k in range(number + 1)] if number else [0]
    return [list(samples[start:end]) for start, end in itertools.pairwise(ends)]


def sample_length(sample: Any) -> int:
    """Return the number of tokens of a sample, or 0 if it has no ``input_ids``."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None and hasattr(ids, "__len__") else 0


def _add_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_samples: int,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    result: PassResult,
) -> None:
    if num_rows(batch) % num_samples:
        raise SingleSamplesNeeded(f"the collator makes {num_rows(batch)} rows of {num_samples} samples")
    tokens = read_batch_tokens(
        batch,
        shifts_labels=settings.shifts_labels,
        encoder_decoder=settings.encoder_decoder,
        token_mask=settings.token_mask,
        num_samples=num_samples,
    )
    result.num_samples += tokens.num_labelled
    result.num_unlabelled += tokens.num_samples - tokens.num_labelled
    if tokens.num_labelled == 0:
        return
    weights = settings.reduction.sample_weights(tokens)
    if weights is None:
        raise SingleSamplesNeeded("the labels of each sample cannot be counted")
    taps = result.taps
    taps.tokens = tokens
    with taps, _weighted_head(model, weights if isinstance(weights, Tensor) else None) as head:
        loss = settings.reduction.loss(compute_loss, model, batch)
        check_loss(loss)
        # gradients in float16, whose range is too small for them as they are
        taps.gradient_scale = _HALF_PRECISION_SCALE if taps.saw_float16 else 1.0
        if loss.requires_grad:
            (loss * (taps.gradient_scale if isinstance(weights, Tensor) else weights * taps.gradient_scale)).backward()
        if head is not None:
            head.check()
    taps.tokens = None


@contextlib.contextmanager
def _weighted_head(model: nn.Module, weights: Tensor | None) -> Any:
    if weights is None:
        yield None
        return
    head = _output_layer(model)
    if head is None:
        raise SingleSamplesNeeded("the model has no output layer to weight its samples at")
    with SampleWeights(head) as sample_weights:
        sample_weights.start(weights)
        yield sample_weights


def _output_layer(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings, or the last part of a model with another head."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if isinstance(head, nn.Module):
        return head
    get_base = getattr(model, "get_base_model", None)
    base: Any = get_base() if callable(get_base) else model
    return next(reversed(list(base.children())), None)


def check_loss(loss: Tensor) -> float:
    """Return the loss as a number.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    value = float(loss.detach().double().item())
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(
            f"The loss of a batch is {value}. Check the samples (labels inside the vocabulary, at least one label) "
            "and the model's dtype: float16 overflows where bfloat16 does not."
        )
    return value


def evaluate_loss(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    batch_size: int,
) -> tuple[float, float]:
    """Sum the loss over samples without gradients.

    Returns:
        The summed loss, and the number of labels (or of samples, for a loss that is not a mean over labels) to divide
        it by. Not finite if a loss is not: a step that is too long does that.
    """
    total, count = 0.0, 0.0
    single = settings.reduction.kind == "unknown"
    make_batches = _whole_batches if settings.reduction.kind == "batch" else _batches
    with torch.no_grad(), without_checkpointing(model):
        for batch_samples in make_batches(samples, 1 if single else batch_size):
            batch = collate(batch_samples)
            tokens = read_batch_tokens(batch, shifts_labels=settings.shifts_labels, num_samples=len(batch_samples))
            if tokens.num_labelled == 0:
                continue
            loss = settings.reduction.loss(compute_loss, model, batch)
            part, weight = settings.reduction.loss_sum(loss.double().item(), tokens)
            total, count = total + part, count + weight
    return total, count


def digest_sample(batch: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the tensors of a batch of one sample, by name and content."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            digest.update(f"{name}:{value.dtype}:{list(value.shape)}:".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_lengths(samples: Sequence[Any], limit: int | None) -> None:
    """Verify that no sample is longer than the model allows.

    Raises:
        DataError: naming the longest one.
    """
    longest = max((sample_length(sample) for sample in samples), default=0)
    if limit is not None and longest > limit:
        raise DataError(
            f"A sample has {longest} tokens and the model allows {limit} (max_position_embeddings). Truncate samples "
            f"to {limit} tokens when you tokenise them."
        )
