"""How the loss of a batch is made of its samples' losses, found by measuring it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, read_batch_tokens

ComputeLoss = Callable[[nn.Module, Mapping[str, Any], Tensor | None], Tensor]
"""Maps model, batch and the number of items to divide by (None: the loss's own mean) to a scalar loss."""

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Makes a batch, on the model's device, of a list of samples."""


Declared = Literal["auto", "token_mean", "sample_mean", "batch"]

DRAWS_AT_RANDOM = "the collator draws at random, so samples together and apart cannot be compared"

_MEASURED = 4
_NO_TARGETS = ("input", "attention_mask", "token_type_ids", "position_ids", "pixel_values", "audio")
"""Beginnings of the names of what a model reads and no loss compares with."""
_MOST_TARGETS = 4096


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

    def num_items(self, tokens: BatchTokens) -> int:
        """Return how many labels or samples the training objective averages over in a batch.

        Raises:
            SingleSamplesNeeded: if this batch does not tell.
        """
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

    Measured on a few pairs of short samples, unlike each other in length, number of labels and the labels themselves,
    all of which must agree. A *sum* over labels halves when the number of items that it is given doubles, and the loss
    of both together is the sum of the losses of each; that holds for transformers' stock losses and for custom ones
    that use ``num_items_in_batch``. Otherwise the loss of both may be the *mean* of the two, over samples or over
    labels. If no sample has a loss alone, it is one of the whole batch (contrastive). Anything else is run one sample
    at a time unless the user declares what it is.

    Args:
        compute: The loss.
        model: The model, in evaluation mode.
        collate: Makes batches.
        samples: At least one sample; up to four of them are used.
        shifts_labels: Whether position t predicts label t + 1.
        declared: What the user says.
    """
    if declared != "auto":
        return LossReduction(kind=declared, reason="declared by loss_reduction")
    if len(samples) < 2:
        return LossReduction(kind="unknown", reason="there is one sample only")
    first, *others = _unlike([_Single.of(sample, collate, shifts_labels) for sample in samples])
    alone = collate([first.sample])
    batches = [(collate([other.sample]), collate([first.sample, other.sample])) for other in others]

    def value(batch: Mapping[str, Any], items: int | None) -> float:
        return compute(model, batch, None if items is None else _items(items, batch)).item()

    def pairs(items: int | None, first_loss: float) -> list[_Pair]:
        return [
            _Pair(
                losses=(first_loss, value(single, items)),
                whole=value(joined, items),
                counts=(first.num_labels, other.num_labels) if first.num_labels and other.num_labels else None,
            )
            for other, (single, joined) in zip(others, batches, strict=True)
        ]

    with torch.no_grad(), _watch_precision() as seen:
        of_one, of_two = (value(alone, items) for items in (1, 2))
        if first.num_labels is not None and _close(of_two * 2, of_one, _tolerance(seen)):
            found = pairs(1, of_one)
            if all(pair.counts and _close(sum(pair.losses), pair.whole, _tolerance(seen)) for pair in found):
                return LossReduction(kind="sum", reason="measured: a sum over labels divided by num_items_in_batch")
        found = pairs(None, value(alone, None))
    reduction = _mean_of(found, _tolerance(seen))
    if reduction.kind == "unknown" and draws_at_random(collate, [first.sample]):
        return LossReduction(kind="unknown", reason=DRAWS_AT_RANDOM)
    return reduction


def draws_at_random(collate: Collate, samples: Sequence[Any]) -> bool:
    """Tell whether a collator makes another batch each time, as one that masks tokens does."""
    first, second = ([tensor for _, tensor in named_tensors(collate(samples))] for _ in range(2))
    alike = len(first) == len(second) and all(a.shape == b.shape for a, b in zip(first, second, strict=True))
    return not alike or not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Single:
    """A sample by itself, and what it may be told from others by. Its batch may be large, and is not kept.

    Attributes:
        num_tokens: Those that are attended to or, without tokens, the size of all that is in the batch.
        num_targets: Size of what the model does not read, such as the boxes of an image.
        num_labels: Those that count in the loss; None: unknown.
        targets: The values of what the model does not read, by name.
    """

    sample: Any
    num_tokens: int
    num_targets: int
    num_labels: int | None
    targets: dict[str, set[float]]

    @classmethod
    def of(cls, sample: Any, collate: Collate, shifts_labels: bool) -> _Single:
        batch = collate([sample])
        tokens = read_batch_tokens(batch, shifts_labels=shifts_labels, num_samples=1)
        tensors = list(named_tensors(batch))
        attended = [mask.sum() for mask in tokens.masks] or [sum(tensor.numel() for _, tensor in tensors)]
        targets: dict[str, set[float]] = {}
        for name, tensor in tensors:
            if not name.startswith(_NO_TARGETS):
                values: list[float] = tensor.detach().flatten()[:_MOST_TARGETS].double().tolist()
                targets.setdefault(name, set()).update(values)
        return cls(
            sample=sample,
            num_tokens=max(map(int, attended)),
            num_targets=sum(tensor.numel() for name, tensor in tensors if not name.startswith(_NO_TARGETS)),
            num_labels=None if tokens.label_counts is None else int(tokens.label_counts[0].item()),
            targets=targets,
        )

    def news(self, known: Sequence[_Single]) -> int:
        """Return in how many respects it is unlike all the others."""
        lengths = [single.num_tokens for single in known]
        return sum(
            (
                self.num_tokens not in lengths,
                all(2 * abs(self.num_tokens - length) > min(self.num_tokens, length) for length in lengths),
                self.num_labels not in [single.num_labels for single in known],
                self.num_targets not in [single.num_targets for single in known],
                *(
                    not values <= set[float]().union(*(single.targets.get(name, ()) for single in known))
                    for name, values in self.targets.items()
                ),
            )
        )


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch with their names: also those in lists and dictionaries, as of boxes they are."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        inside: Mapping[Any, Any] = value
        for key, item in inside.items():
            yield from named_tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in list[Any](value):
            yield from named_tensors(item, name)


def choose_unlike(samples: Sequence[Any], collate: Collate, *, shifts_labels: bool) -> list[Any]:
    """Return up to four short samples that differ in length, number of labels and labels as far as any do."""
    return [single.sample for single in _unlike([_Single.of(s, collate, shifts_labels) for s in samples])]


def _unlike(singles: list[_Single]) -> list[_Single]:
    """Choose the shortest sample and a few that are unlike it and each other, the shortest such."""
    first, *left = sorted(singles, key=lambda single: single.num_tokens)
    chosen = [first]
    while left and len(chosen) < _MEASURED:
        best = max(left, key=lambda single: single.news(chosen))
        left = [single for single in left if single is not best]
        chosen.append(best)
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The losses of two samples, of both together, and their numbers of labels if known."""

    losses: tuple[float, float]
    whole: float
    counts: tuple[int, int] | None

    def off(self, weights: tuple[int, int]) -> float:
        """Return how far the loss of both is from the weighted mean of the two, as a part of it."""
        mean = sum(weight * loss for weight, loss in zip(weights, self.losses, strict=True)) / sum(weights)
        difference = abs(self.whole - mean)
        if not math.isfinite(difference) or (difference and not self.whole):
            return math.inf
        return difference / abs(self.whole) if difference else 0.0

    def is_only_together(self, tolerance: float) -> bool:
        """Tell whether neither sample has a loss alone, and both together have one."""
        return 0 < abs(self.whole) < math.inf and not any(
            abs(loss) > tolerance * abs(self.whole) for loss in self.losses
        )


def _mean_of(pairs: Sequence[_Pair], tolerance: float) -> LossReduction:
    """Tell what mean the losses of pairs of samples are, if any: the same one for all of them."""
    if all(pair.is_only_together(tolerance) for pair in pairs):
        return LossReduction(kind="batch", reason="measured: samples have a loss together and none alone")
    off_mean = max(pair.off((1, 1)) for pair in pairs)
    if all(pair.counts == (1, 1) for pair in pairs):
        off_labels = math.inf
    else:
        off_labels = max(math.inf if pair.counts is None else pair.off(pair.counts) for pair in pairs)
    if min(off_mean, off_labels) <= tolerance:
        if off_labels > 10 * off_mean:
            return LossReduction(kind="sample_mean", reason="measured: the mean of its samples' losses")
        if off_mean > 10 * off_labels:
            return LossReduction(kind="token_mean", reason="measured: the mean over the batch's labels")
        if all(pair.counts and pair.counts[0] == pair.counts[1] for pair in pairs):
            return LossReduction(kind="even_mean", reason="measured: the mean of samples with equally many labels")
        return LossReduction(
            kind="unknown",
            reason="a mean, and the losses are too alike in this precision to tell whether of labels or of samples: "
            "loss_reduction can say it",
        )
    return LossReduction(kind="unknown", reason="the loss of two samples is neither the sum nor a mean of theirs")


def _items(number: int, batch: Mapping[str, Any]) -> Tensor:
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), None)
    return torch.tensor(number, device=device)


@contextlib.contextmanager
def _watch_precision() -> Generator[set[tuple[torch.dtype, str]]]:
    """Note the dtypes that modules put out, which autocast inside the model decides, and the kinds of device.

    An int8 layer rounds its input too, whatever it puts out.
    """
    seen: set[tuple[torch.dtype, str]] = set()

    def on_forward(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            rounded = getattr(getattr(module, "weight", None), "dtype", None) == torch.int8
            seen.add((torch.int8 if rounded else output.dtype, output.device.type))

    with nn.modules.module.register_module_forward_hook(on_forward):
        yield seen


def _tolerance(seen: set[tuple[torch.dtype, str]]) -> float:
    if {dtype for dtype, _ in seen} & {torch.bfloat16, torch.float16, torch.int8}:
        return 2e-2
    return 1e-5 if all(device == "cpu" for _, device in seen) else 1e-3  # TF32


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-12)
