"""Which tokens of a batch count, how many labels it has, and which rows of a layer are of those tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORED_LABEL = -100

_OTHER_MODALITIES = ("pixel_values", "input_features", "input_values", "audio")
"""How transformers' names for inputs other than tokens begin."""


class SingleSamplesNeeded(Exception):
    """This model or loss cannot be collected in batches of several samples; the message says why."""


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """The tokens of one batch.

    Attributes:
        label_counts: ``[B]``, labels of each sample that count in the loss; None if that cannot be told.
        masks: Masks ``[B, S]`` of the tokens that the second moments count, one for each sequence that the model
            reads (an encoder-decoder reads two); ``[B * C, S]`` if each sample is C sequences to choose from.
        num_labels: Labels in the batch; None if it has no labels.
        other_modality: Whether the batch has inputs other than tokens (images, audio).
        masks_other_modality: Whether the first mask is of those, before the model makes fewer frames of them.
    """

    num_samples: int
    label_counts: Tensor | None
    masks: tuple[Tensor, ...]
    num_labels: int | None = None
    other_modality: bool = False
    masks_other_modality: bool = False

    @functools.cached_property
    def kept(self) -> tuple[Tensor | None, ...]:
        """Indices of the tokens that count, or None for all of them: found once a batch, since it waits for the GPU."""
        return tuple(None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1) for mask in self.masks)

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a label, or of all if labels are unknown."""
        return self.num_samples if self.label_counts is None else int((self.label_counts > 0).sum().item())


def read_batch_tokens(
    batch: Mapping[str, Any],
    *,
    shifts_labels: bool,
    encoder_decoder: bool = False,
    token_mask: Literal["attention", "labels"] = "attention",
    num_samples: int | None = None,
) -> BatchTokens:
    """Find the token masks and label counts of a collated batch; samples without a label are masked out.

    Args:
        token_mask: ``"attention"``: tokens that are attended to. ``"labels"``: positions whose prediction is a label;
            of an encoder's sequence those that are attended to.
        num_samples: Samples in the batch, each of which may be several rows; None: one for each row.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        labels = None
    predicted = _predicted_positions(batch, labels, shifts_labels)
    counts = None if predicted is None else predicted.reshape(predicted.shape[0], -1).sum(dim=1)
    masks = _attended_positions(batch, labels if encoder_decoder else None)
    if token_mask == "labels" and predicted is not None and predicted.dim() == 2:
        masks = (*masks[:-1], predicted) if encoder_decoder else (predicted,)  # the encoder predicts nothing
    if counts is not None:
        masks = tuple(_of_labelled(mask, counts > 0, batch.get("input_ids")) for mask in masks)
    by_sample = counts
    if counts is not None and num_samples not in (None, len(counts)):
        by_sample = counts.sum(dim=0, keepdim=True) if num_samples == 1 else None
    return BatchTokens(
        num_samples=num_rows(batch) if num_samples is None else num_samples,
        label_counts=by_sample,
        num_labels=None if counts is None else int(counts.sum().item()),
        masks=masks,
        other_modality=any(name.startswith(_OTHER_MODALITIES) for name in batch),
        masks_other_modality=_masks_other_modality(batch),
    )


def lengthened(batch: Mapping[str, Any], longest: int | None, *, decoder: bool) -> Mapping[str, Any]:
    """Pad the text of a batch, or what its decoder reads, by one position that does not count, if it may be longer.

    A layer that gets as many rows as before does not read it. A batch with more that is as long is left alone.
    """
    text: Any = batch.get("labels") if decoder else batch.get("input_ids", batch.get("labels"))
    if not _is_sequences(text) or (longest is not None and text.shape[1] >= longest):
        return batch
    as_long = [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape[:2] == text.shape]
    if decoder:
        as_long = [name for name in as_long if name not in ("input_ids", "attention_mask")]
    known = ("labels", "decoder_input_ids", "decoder_attention_mask") if decoder else ("_ids", "_mask", "labels")
    if not all(_is_sequences(batch[name]) and name.endswith(known) for name in as_long):
        return batch
    values = {name: IGNORED_LABEL if "labels" in name else 0 for name in as_long}
    return {**batch, **{name: torch.nn.functional.pad(batch[name], (0, 1), value=v) for name, v in values.items()}}


def _is_sequences(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _masks_other_modality(batch: Mapping[str, Any]) -> bool:
    """Tell by its length, in a batch without tokens, whether the mask ``[B, S]`` is one of audio or images."""
    attention = batch.get("attention_mask")
    if not isinstance(attention, Tensor) or attention.dim() != 2 or "input_ids" in batch:
        return False
    inputs = [v for name, v in batch.items() if isinstance(v, Tensor) and name.startswith(_OTHER_MODALITIES)]
    return any(attention.shape[1] in value.shape[1:] for value in inputs)


def _of_labelled(mask: Tensor, labelled: Tensor, ids: Any) -> Tensor:
    """Mask out the sequences of samples that are not ``labelled [B]``, where they can be told."""
    if isinstance(ids, Tensor) and ids.dim() == 3:  # each sample is several sequences, which run one by one
        labelled = labelled.repeat_interleave(max(1, mask.shape[0] // len(labelled)))
    return mask & labelled[:, None] if len(mask) == len(labelled) else mask


def num_rows(batch: Mapping[str, Any]) -> int:
    """Return the length of the first dimension of a batch."""
    first = ("input_ids", "labels", "attention_mask", "inputs_embeds", "pixel_values", "input_features")
    tensors = [value for value in (*map(batch.get, first), *batch.values()) if isinstance(value, Tensor)]
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)


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


def _attended_positions(batch: Mapping[str, Any], read_labels: Tensor | None) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    attention, ids, decoder = (batch.get(name) for name in ("attention_mask", "input_ids", "decoder_attention_mask"))
    if isinstance(attention, Tensor) and attention.dim() == 2:
        found.append(attention.bool())
    elif isinstance(ids, Tensor):
        alike = attention if isinstance(attention, Tensor) and attention.shape == ids.shape else torch.ones_like(ids)
        mask = alike.bool()
        found.append(mask.flatten(0, 1) if mask.dim() == 3 else mask)
    if isinstance(decoder, Tensor) and decoder.dim() == 2:
        found.append(decoder.bool())
    elif read_labels is not None and read_labels.dim() == 2:
        found.append(read_labels != IGNORED_LABEL)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Which of a batch's ``count`` tokens a layer is given: the place ``[rows]`` of each row's token among them."""

    indices: Tensor
    count: int


def rows_that_count(
    tokens: BatchTokens,
    leading_shape: torch.Size,
    *,
    layer: str,
    sequences: frozenset[int] | None = None,
    routed: RoutedTokens | None = None,
) -> Tensor | None:
    """Return the indices ``[kept]`` of the rows of a layer that count, or their mask ``[rows]``; None if all do.

    Rows that match no sequence of tokens are those of the other modality if there is one, or one a sample, and count
    if the sample has a label. ``sequences`` are those that the rows may be of (`followed_sequences`), and ``routed``
    the tokens that the layer is given, if not all.
    """
    kept = _rows(tokens, leading_shape if routed is None else torch.Size([routed.count]), layer, sequences)
    if kept is None or routed is None:
        return kept
    counts = torch.zeros(routed.count, dtype=torch.bool, device=routed.indices.device)
    counts[kept.to(counts.device)] = True
    return counts[routed.indices]  # how many they are is left on the device, so that nothing waits for it


def _rows(tokens: BatchTokens, shape: torch.Size, layer: str, sequences: frozenset[int] | None) -> Tensor | None:
    is_flat = len(shape) == 1 or tokens.num_samples == 1
    numbers = range(len(tokens.masks)) if sequences is None else sequences
    matching = [k for k in numbers if _without_ones(tokens.masks[k].shape) == _without_ones(shape)]
    if not matching and is_flat:
        matching = [k for k in numbers if tokens.masks[k].numel() == shape.numel()]
    if matching:
        first, *others = (tokens.kept[k] for k in matching)
        if any(kept is not first and (kept is None or first is None or not kept.equal(first)) for kept in others):
            raise SingleSamplesNeeded(
                f"the rows of {layer}, {list(shape)}, could be those of either of the model's sequences"
            )
        return first
    if not is_flat and shape[0] % tokens.num_samples:
        raise SingleSamplesNeeded(f"some rows are not those of one sample after another ({list(shape)} in {layer})")
    if tokens.masks_other_modality and tokens.num_samples > 1 and tokens.kept[0] is not None:
        raise SingleSamplesNeeded(
            f"the attention mask is of another sequence than the layers' rows ({list(tokens.masks[0].shape)}, and "
            f"{list(shape)} in {layer})"
        )
    all_labelled = tokens.num_labelled == tokens.num_samples
    if all(kept is None for kept in tokens.kept) or (tokens.other_modality and all_labelled):
        return None
    if tokens.num_samples in (1, shape.numel()):  # one row a sample, as heads that classify have it
        return None if all_labelled or tokens.label_counts is None else tokens.label_counts.nonzero().squeeze(1)
    for mask in tokens.masks:
        if shape.numel() == len(mask):  # one row a sequence, of which a sample has several
            return mask.any(dim=1).nonzero().squeeze(1)
    shapes = ", ".join(str(list(mask.shape)) for mask in tokens.masks)
    raise SingleSamplesNeeded(f"the rows of {layer}, {list(shape)}, do not match the token mask {shapes}")


def _without_ones(shape: torch.Size) -> list[int]:
    """Return the shape without dimensions of 1 after the first, as heads that are shared have them."""
    return [*shape[:1], *(size for size in shape[1:] if size != 1)]
