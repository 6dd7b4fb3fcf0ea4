"""Which tokens of a batch count, and how many labels each of its samples has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORED_LABEL = -100


class SingleSamplesNeeded(Exception):
    """This model or loss cannot be collected in batches of several samples; the message says why."""


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """The tokens of one batch.

    Attributes:
        num_samples: B.
        label_counts: ``[B]``, labels of each sample that count in the loss; None if the batch has no labels.
        masks: Masks ``[B, S]`` of the tokens that the second moments count, one for each sequence that the model
            reads (an encoder-decoder reads two).
    """

    num_samples: int
    label_counts: Tensor | None
    masks: tuple[Tensor, ...]

    def rows(self, leading_shape: torch.Size, *, layer: str) -> Tensor | None:
        """Return the indices ``[kept]`` of the rows that count, for a layer with this shape before the last dimension.

        Returns:
            None if every row counts.

        Raises:
            SingleSamplesNeeded: if the layer's rows cannot be matched to the tokens and some tokens do not count, or
                if they match two sequences of which different tokens count.
        """
        for matches in (lambda mask: mask.shape == leading_shape, lambda mask: mask.numel() == leading_shape.numel()):
            found = [kept for mask, kept in zip(self.masks, self._kept, strict=True) if matches(mask)]
            if self.num_samples > 1 and any(not _same(kept, found[0]) for kept in found[1:]):
                raise SingleSamplesNeeded(
                    f"the rows of {layer}, {list(leading_shape)}, could be those of either of the model's sequences"
                )
            if found:
                return found[0]
        if all(kept is None for kept in self._kept):
            return None
        shapes = ", ".join(str(list(mask.shape)) for mask in self.masks)
        raise SingleSamplesNeeded(f"the rows of {layer}, {list(leading_shape)}, do not match the token mask {shapes}")

    @functools.cached_property
    def _kept(self) -> tuple[Tensor | None, ...]:
        """Indices of the tokens that count, or None for all of them: found once a batch, since it waits for the GPU."""
        return tuple(None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1) for mask in self.masks)

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a label, or of all if labels are unknown."""
        return self.num_samples if self.label_counts is None else int((self.label_counts > 0).sum().item())


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def read_batch_tokens(
    batch: Mapping[str, Any], *, shifts_labels: bool, token_mask: Literal["attention", "labels"] = "attention"
) -> BatchTokens:
    """Find the token masks and label counts of a collated batch.

    Samples without a label do not count anywhere: their tokens are masked out.

    Args:
        batch: What the collator made: tensors with the samples in their first dimension.
        shifts_labels: Whether position t predicts label t + 1, as causal language models do.
        token_mask: ``"attention"``: tokens that are attended to. ``"labels"``: positions whose prediction is a label.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        labels = None
    predicted = _predicted_positions(batch, labels, shifts_labels)
    counts = None if predicted is None else predicted.reshape(predicted.shape[0], -1).sum(dim=1)
    attended = _attended_positions(batch, labels, shifts_labels)
    if token_mask == "labels" and predicted is not None and predicted.dim() == 2:
        masks = tuple(predicted for mask in attended if mask.shape == predicted.shape) or (predicted,)
    else:
        masks = attended
    if counts is not None:
        masks = tuple(mask & (counts > 0)[:, None] for mask in masks)
    return BatchTokens(num_samples=_num_samples(batch), label_counts=counts, masks=masks)


def _num_samples(batch: Mapping[str, Any]) -> int:
    for name in ("input_ids", "labels", "attention_mask", "inputs_embeds", "pixel_values", "input_features"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].shape[0]
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 1


def _predicted_positions(batch: Mapping[str, Any], labels: Tensor | None, shifts_labels: bool) -> Tensor | None:
    shifted = batch.get("shift_labels")
    if isinstance(shifted, Tensor):
        return shifted != IGNORED_LABEL
    if labels is None:
        return None
    predicted = labels != IGNORED_LABEL
    if not shifts_labels or labels.dim() != 2:
        return predicted if labels.dim() else predicted[None]
    return torch.cat([predicted[:, 1:], torch.zeros_like(predicted[:, :1])], dim=1)


def _attended_positions(batch: Mapping[str, Any], labels: Tensor | None, shifts_labels: bool) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    attention = batch.get("attention_mask")
    if isinstance(attention, Tensor) and attention.dim() == 2:
        found.append(attention.bool())
    elif isinstance(batch.get("input_ids"), Tensor):
        found.append(torch.ones_like(batch["input_ids"], dtype=torch.bool))
    decoder = batch.get("decoder_attention_mask")
    if isinstance(decoder, Tensor) and decoder.dim() == 2:
        found.append(decoder.bool())
    elif labels is not None and labels.dim() == 2 and not shifts_labels:
        found.append(labels != IGNORED_LABEL)
    return tuple(found)
