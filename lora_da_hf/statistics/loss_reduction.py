"""How the loss of a batch is made of its samples' losses, found by measuring it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_da_hf.statistics.batches import Collate
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, read_batch_tokens

ComputeLoss = Callable[[nn.Module, Mapping[str, Any], Tensor | None], Tensor]
"""Maps model, batch and the number of items to divide by (None: the loss's own mean) to a scalar loss."""

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LossReduction:
    """What a batch's loss is, in terms of its samples.

    Attributes:
        kind: ``"sum"``: the sum over labels, divided by the number of items that is passed in. ``"token_mean"``: the
            mean over the batch's labels. ``"sample_mean"``: the mean over its samples. ``"even_mean"``: either of the
            two, which are the same as long as the samples have equally many labels. ``"batch"``: a loss of the batch
            as a whole, that cannot be split. ``"unknown"``: samples must be run one at a time.
    """

    kind: Literal["sum", "token_mean", "sample_mean", "even_mean", "batch", "unknown"]
    reason: str

    def loss(self, compute: ComputeLoss, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Compute the loss of a batch: summed over labels if it can be, else by its own mean."""
        return compute(model, batch, _items(1, batch) if self.kind == "sum" else None)

    def num_items(self, tokens: BatchTokens) -> int:
        """Return how many labels or samples the training objective averages over in a batch, if that can be told."""
        if self.kind in ("sum", "token_mean") and tokens.num_labels is not None:
            return tokens.num_labels
        if tokens.num_samples == 1 or self.kind == "batch":
            return tokens.num_samples
        if self.kind == "sample_mean" and tokens.num_labelled == tokens.num_samples:
            return tokens.num_samples
        counts = tokens.label_counts
        if self.kind == "even_mean" and counts is not None and bool((counts == counts[0]).all()):
            return tokens.num_samples
        raise SingleSamplesNeeded("its labels do not tell what the loss of a batch is a mean over")

    def weight(self, num_items: int) -> float:
        """Return what the loss of a batch is multiplied by to become a sum over its items."""
        return 1.0 if self.kind == "sum" else float(num_items)


class UnlikeSamples:
    """Samples that are unlike each other as batches: each alone, and the first with each other one.

    Attributes:
        counts: How many labels each sample has; 0 where that is not known.
    """

    def __init__(
        self, samples: Sequence[Any], collate: Collate, compute: ComputeLoss, model: nn.Module, *, shifts_labels: bool
    ) -> None:
        self.singles = [collate([sample]) for sample in samples]
        self.pairs = [collate([samples[0], other]) for other in samples[1:]]
        tokens = [read_batch_tokens(one, shifts_labels=shifts_labels, num_samples=1) for one in self.singles]
        self.counts = [one.num_labels or 0 for one in tokens]
        self._compute, self._model = compute, model
        self._known: dict[tuple[int, int | None], float] = {}

    def loss(self, batch: Mapping[str, Any], items: int | None) -> float:
        """Return the loss of a batch divided by a number of items, or its own mean; none is computed twice."""
        key = id(batch), items
        if key not in self._known:
            with torch.no_grad():
                loss = self._compute(self._model, batch, None if items is None else _items(items, batch))
            self._known[key] = loss.item()
        return self._known[key]


def find_reduction(
    samples: UnlikeSamples, *, declared: Literal["auto", "token_mean", "sample_mean", "batch"] = "auto"
) -> LossReduction:
    """Find out how the loss of a batch is made of its samples' losses.

    The first sample is run alone and together with each other one, and all pairs must agree. A *sum* over labels halves
    when the number of items that it is given doubles, and the loss of both together is the sum of the losses of each.
    Otherwise the loss of both may be the *mean* of the two, over samples or over labels. If no sample has a loss alone,
    it is one of the whole batch (contrastive). Anything else is run one sample at a time unless the user declares it.
    """
    if declared != "auto":
        return LossReduction(kind=declared, reason="declared by loss_reduction")
    if not samples.pairs:
        return LossReduction(kind="unknown", reason="there is one sample only")
    counts = samples.counts

    def pairs(items: int | None) -> list[_Pair]:
        first, *others = [samples.loss(single, items) for single in samples.singles]
        wholes = [samples.loss(both, items) for both in samples.pairs]
        labels = [(counts[0], count) if all(counts) else None for count in counts[1:]]
        return [_Pair(first, *pair) for pair in zip(others, wholes, labels, strict=True)]

    with _watched_tolerance() as seen:
        of_one, of_two = (samples.loss(samples.singles[0], items) for items in (1, 2))
        if all(counts) and _close(of_two * 2, of_one, max(seen)):
            if all(_close(pair.first + pair.second, pair.whole, max(seen)) for pair in pairs(1)):
                return LossReduction(kind="sum", reason="measured: a sum over labels divided by num_items_in_batch")
        return _mean_of(pairs(None), max(seen))


class _Pair(NamedTuple):
    """The losses of two samples, of both together, and their numbers of labels if known."""

    first: float
    second: float
    whole: float
    counts: tuple[int, int] | None

    def off(self, weights: tuple[int, int] | None) -> float:
        """Return how far the loss of both is from the weighted mean of the two, as a part of it."""
        if weights is None:
            return math.inf
        mean = (weights[0] * self.first + weights[1] * self.second) / sum(weights)
        off = abs(self.whole - mean) / max(abs(self.whole), _TINY)
        return off if math.isfinite(off) else math.inf

    def is_only_together(self, tolerance: float) -> bool:
        """Tell whether neither sample has a loss alone, and both together have one."""
        size = abs(self.whole)
        return 0 < size < math.inf and not any(abs(loss) > tolerance * size for loss in (self.first, self.second))


def _mean_of(pairs: Sequence[_Pair], tolerance: float) -> LossReduction:
    """Tell what mean the losses of pairs of samples are, if any: the same one for all of them."""
    if all(pair.is_only_together(tolerance) for pair in pairs):
        return LossReduction(kind="batch", reason="measured: samples have a loss together and none alone")
    off_mean = max(pair.off((1, 1)) for pair in pairs)
    off_labels = max(pair.off(pair.counts) for pair in pairs)
    if all(pair.counts == (1, 1) for pair in pairs):
        off_labels = math.inf
    if min(off_mean, off_labels) > tolerance:
        if all(pair.counts == (1, 1) and min(pair[:2]) <= pair.whole <= max(pair[:2]) for pair in pairs):
            return LossReduction(kind="batch", reason="measured: a mean of unlike weights, as those of classes are")
        return LossReduction(kind="unknown", reason="the loss of two samples is neither the sum nor a mean of theirs")
    if off_labels > 10 * off_mean:
        return LossReduction(kind="sample_mean", reason="measured: the mean of its samples' losses")
    if off_mean > 10 * off_labels:
        return LossReduction(kind="token_mean", reason="measured: the mean over the batch's labels")
    if all(pair.counts and pair.counts[0] == pair.counts[1] for pair in pairs):
        return LossReduction(kind="even_mean", reason="measured: the mean of samples with equally many labels")
    reason = "a mean, and the losses are too alike in this precision to tell whether of labels or of samples"
    return LossReduction(kind="unknown", reason=f"{reason}: loss_reduction can say it")


def _items(number: int, batch: Mapping[str, Any]) -> Tensor:
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), None)
    return torch.tensor(number, device=device)


@contextlib.contextmanager
def _watched_tolerance() -> Generator[set[float]]:
    """Collect how far apart equal losses may be, by what modules put out: autocast inside the model decides that."""
    seen = {1e-5}

    def on_forward(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            of_weight = getattr(getattr(module, "weight", None), "dtype", None)  # a layer of int8 rounds its input too
            is_rounded = output.dtype in (torch.bfloat16, torch.float16) or of_weight == torch.int8
            seen.add(2e-2 if is_rounded else 1e-3 if output.device.type != "cpu" else 1e-5)  # TF32

    with nn.modules.module.register_module_forward_hook(on_forward):
        yield seen


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-12)
