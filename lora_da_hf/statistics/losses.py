"""How the loss of a batch is made of its samples' losses, found by measuring it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_hf.statistics.token_masks import BatchTokens, read_batch_tokens

ComputeLoss = Callable[[nn.Module, Mapping[str, Any], Tensor | None], Tensor]
"""Maps model, batch and the number of items to divide by (None: the loss's own mean) to a scalar loss."""

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Makes a batch, on the model's device, of a list of samples."""


Declared = Literal["auto", "token_mean", "sample_mean", "batch"]


@dataclass(frozen=True, kw_only=True)
class LossReduction:
    """What a batch's loss is, in terms of its samples.

    Attributes:
        kind: ``"sum"``: the sum over labels, divided by the number of items that is passed in. ``"token_mean"``: the
            mean over the batch's labels. ``"sample_mean"``: the mean over its samples. ``"even_mean"``: either of the
            two, which are the same as long as the samples have equally many labels. ``"batch"``: a loss of the batch
            as a whole, that cannot be split. ``"unknown"``: samples must be run one at a time.
        reason: Where that is known from, for the report.
    """

    kind: Literal["sum", "token_mean", "sample_mean", "even_mean", "batch", "unknown"]
    reason: str

    def loss(self, compute: ComputeLoss, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Compute the loss of a batch: summed over labels if it can be, else by its own mean."""
        return compute(model, batch, _items(1, batch) if self.kind == "sum" else None)

    def sample_weights(self, tokens: BatchTokens) -> Tensor | float | None:
        """Return what each sample's gradient must be multiplied by to be that of the sample's mean loss.

        Returns:
            ``[B]``, or one number if it is the same for all, or None if it cannot be known for this batch.
        """
        if tokens.num_samples == 1 and self.kind != "sum":
            return 1.0
        if self.kind == "batch":
            return float(tokens.num_samples)
        if self.kind == "sample_mean":  # whether samples without a label are in the mean is not known
            return float(tokens.num_samples) if tokens.num_labelled == tokens.num_samples else None
        counts = tokens.label_counts
        if self.kind == "unknown" or counts is None:
            return None
        total = 1.0 if self.kind == "sum" else counts.sum().item()
        if bool((counts == counts[0]).all()):
            return total / max(counts[0].item(), 1)
        if self.kind == "even_mean":
            return None
        return torch.where(counts > 0, total / counts.clamp_min(1), 0.0)

    def loss_sum(self, loss: float, tokens: BatchTokens) -> tuple[float, float]:
        """Return the summed loss of a batch and what it has to be divided by, so that batches can be added."""
        counts = tokens.label_counts
        if self.kind == "sum" and counts is not None:
            return loss, counts.sum().item()
        if self.kind == "token_mean" and counts is not None:
            return loss * counts.sum().item(), counts.sum().item()
        return loss * tokens.num_samples, tokens.num_samples


def find_reduction(
    compute: ComputeLoss,
    model: nn.Module,
    collate: Collate,
    samples: Sequence[Any],
    *,
    shifts_labels: bool,
    declared: Declared = "auto",
) -> LossReduction:
    """Find out how the loss of a batch is made of its samples'.

    Measured on two samples, with different numbers of labels if there are such. A *sum* over labels halves when the
    number of items that it is given doubles, and the loss of both together is the sum of the losses of each; that
    holds for transformers' stock losses and for custom ones that use ``num_items_in_batch``. Otherwise the loss of both
    may be the *mean* of the two, over samples or over labels. If neither sample has a loss alone, it is one of the
    whole batch (contrastive). Anything else is run one sample at a time unless the user declares what it is.

    Args:
        compute: The loss.
        model: The model, in evaluation mode.
        collate: Makes batches.
        samples: At least one sample; two are used.
        shifts_labels: Whether position t predicts label t + 1.
        declared: What the user says.
    """
    if declared != "auto":
        return LossReduction(kind=declared, reason="declared by loss_reduction")
    if len(samples) < 2:
        return LossReduction(kind="unknown", reason="there is one sample only")
    batches, counts = _pair(collate, samples, shifts_labels)
    with torch.no_grad(), _watch_precision() as seen:
        sums = [compute(model, batch, _items(1, batch)).double().item() for batch in batches]
        halved = compute(model, batches[1], _items(2, batches[1])).double().item()
        divides = _close(halved * 2, sums[1], _tolerance(seen))
        if divides and counts is not None and _close(sums[1] + sums[2], sums[0], _tolerance(seen)):
            return LossReduction(kind="sum", reason="measured: a sum over labels divided by num_items_in_batch")
        whole, first, second = (compute(model, batch, None).double().item() for batch in batches)
    return _mean_of(whole, first, second, counts, _tolerance(seen))


def _pair(
    collate: Collate, samples: Sequence[Any], shifts_labels: bool
) -> tuple[list[Mapping[str, Any]], tuple[int, int] | None]:
    """Return the batches of two samples, of the first and of the second, and their numbers of labels if known."""

    def labels(sample: Any) -> int | None:
        counts = read_batch_tokens(collate([sample]), shifts_labels=shifts_labels, num_samples=1).label_counts
        return None if counts is None else int(counts[0].item())

    first = samples[0]
    number = labels(first)
    other = next((sample for sample in samples[1:] if labels(sample) != number), samples[1])
    batches = [collate(list(pair)) for pair in ((first, other), (first,), (other,))]
    other_number = labels(other)
    return batches, None if number is None or other_number is None else (number, other_number)


def _mean_of(
    whole: float, first: float, second: float, counts: tuple[int, int] | None, tolerance: float
) -> LossReduction:
    """Tell what mean the loss of two samples is, if any."""
    if 0 < abs(whole) < math.inf and not any(abs(loss) > tolerance * abs(whole) for loss in (first, second)):
        return LossReduction(kind="batch", reason="measured: samples have a loss together and none alone")
    off_mean = abs(whole - (first + second) / 2)
    if counts is None or counts == (1, 1):
        off_labels = math.inf
    else:
        off_labels = abs(whole - (counts[0] * first + counts[1] * second) / sum(counts))
    limit = tolerance * abs(whole)
    if min(off_mean, off_labels) <= limit:
        if off_labels > 10 * off_mean:
            return LossReduction(kind="sample_mean", reason="measured: the mean of its samples' losses")
        if off_mean > 10 * off_labels:
            return LossReduction(kind="token_mean", reason="measured: the mean over the batch's labels")
        return LossReduction(kind="even_mean", reason="measured: the mean of samples with equally many labels")
    return LossReduction(kind="unknown", reason="the loss of two samples is neither the sum nor a mean of theirs")


def _items(number: int, batch: Mapping[str, Any]) -> Tensor:
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), None)
    return torch.tensor(number, device=device)


@contextlib.contextmanager
def _watch_precision() -> Generator[set[torch.dtype]]:
    """Note the dtypes that modules put out, which autocast inside the model decides."""
    seen: set[torch.dtype] = set()

    def on_forward(_: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.add(output.dtype)

    handle = nn.modules.module.register_module_forward_hook(on_forward)
    try:
        yield seen
    finally:
        handle.remove()


def _tolerance(seen: set[torch.dtype]) -> float:
    return 2e-2 if seen & {torch.bfloat16, torch.float16} else 1e-3


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-12)
