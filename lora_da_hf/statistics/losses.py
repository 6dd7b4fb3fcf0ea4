"""How the loss of a batch is made of its samples' losses, found by measuring it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_hf.statistics.token_masks import BatchTokens

ComputeLoss = Callable[[nn.Module, Mapping[str, Any], Tensor | None], Tensor]
"""Maps model, batch and the number of items to divide by (None: the loss's own mean) to a scalar loss."""

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Makes a batch, on the model's device, of a list of samples."""


@dataclass(frozen=True, kw_only=True)
class LossReduction:
    """What a batch's loss is, in terms of its samples.

    Attributes:
        kind: ``"sum"``: the sum over labels, divided by the number of items that is passed in. ``"token_mean"``: the
            mean over the batch's labels. ``"sample_mean"``: the mean over its samples. ``"unknown"``: samples must be
            run one at a time.
        reason: Where that is known from, for the report.
    """

    kind: Literal["sum", "token_mean", "sample_mean", "unknown"]
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
        if self.kind == "sample_mean":
            return float(tokens.num_samples)
        counts = tokens.label_counts
        if self.kind == "unknown" or counts is None:
            return None
        total = 1.0 if self.kind == "sum" else counts.sum().item()
        if bool((counts == counts[0]).all()):
            return total / max(counts[0].item(), 1)
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
    declared: Literal["auto", "token_mean", "sample_mean"] = "auto",
) -> LossReduction:
    """Find out whether a loss is a sum over labels divided by the number of items it is given.

    Measured on two samples: the loss must halve when the number of items doubles, and the loss of both together must
    be the sum of the losses of each. That holds for transformers' stock losses and for custom ones that use
    ``num_items_in_batch``; anything else is run one sample at a time unless the user declares what it is.

    Args:
        compute: The loss.
        model: The model, in evaluation mode.
        collate: Makes batches.
        samples: At least one sample; two are used.
        declared: What the user says.
    """
    if declared != "auto":
        return LossReduction(kind=declared, reason="declared by loss_reduction")
    if len(samples) < 2:
        return LossReduction(kind="unknown", reason="there is one sample only")
    pair = samples[:2]
    with torch.no_grad(), _watch_precision() as seen:
        both, first, second = collate(pair), collate(pair[:1]), collate(pair[1:])
        whole, part, other = (compute(model, b, _items(1, b)).double().item() for b in (both, first, second))
        halved = compute(model, first, _items(2, first)).double().item()
    tolerance = 2e-2 if seen & {torch.bfloat16, torch.float16} else 1e-3
    if not _close(halved * 2, part, tolerance):
        return LossReduction(kind="unknown", reason="the loss does not divide by num_items_in_batch")
    if not _close(part + other, whole, tolerance):
        return LossReduction(kind="unknown", reason="the loss of two samples is not the sum of theirs")
    return LossReduction(kind="sum", reason="measured: a sum over labels divided by num_items_in_batch")


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


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-12)
