"""Which tokens of a batch count, and how many labels each of its samples has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lora_da_hf.errors import StatisticsError

IGNORED_LABEL = -100

_OF_DECODER = ("decoder_input_ids", "decoder_attention_mask")
_OTHER_MODALITIES = ("pixel_values", "input_features", "input_values", "audio")
"""How transformers' names for inputs other than tokens begin."""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor that a layer is called with.

    Raises:
        StatisticsError: without a tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise StatisticsError("A tapped layer was called without a tensor. Exclude it from target_modules.")


class SingleSamplesNeeded(Exception):
    """This model or loss cannot be collected in batches of several samples; the message says why."""


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Which tokens of a batch a layer is given.

    Attributes:
        indices: ``[rows]``, the place of each row's token among all of them.
        count: How many there are.
    """

    indices: Tensor
    count: int


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """The tokens of one batch.

    Attributes:
        num_samples: B.
        label_counts: ``[B]``, labels of each sample that count in the loss; None if the batch has no labels, or they
            cannot be told apart by sample.
        num_labels: How many there are in the batch; None if it has no labels.
        masks: Masks ``[B, S]`` of the tokens that the second moments count, one for each sequence that the model
            reads (an encoder-decoder reads two); ``[B * C, S]`` if each sample is C sequences to choose from.
        other_modality: Whether the batch has inputs other than tokens (images, audio).
        masks_other_modality: Whether the first mask is of those inputs, as they are before the model makes fewer
            frames of them.
    """

    num_samples: int
    label_counts: Tensor | None
    masks: tuple[Tensor, ...]
    num_labels: int | None = None
    other_modality: bool = False
    masks_other_modality: bool = False

    def rows(self, leading_shape: torch.Size, *, layer: str, sequences: frozenset[int] | None = None) -> Tensor | None:
        """Return the indices ``[kept]`` of the rows that count, for a layer with this shape before the last dimension.

        Rows that match no sequence of tokens are those of the other modality if there is one, or one a sample. Those of
        samples that have a label count. Of a single sample they all do, as the rows of relative positions that some
        models project by the layers of the tokens. Should a single sample be padded to just as many rows as there are
        such positions, nothing tells the two apart, and the mask is taken for both.

        Args:
            leading_shape: As ``[B, S]``; dimensions of 1 make no difference.
            layer: The layer's name, for messages.
            sequences: Those that its rows may be of, by number (`followed_sequences`); None: any.

        Returns:
            None if every row counts.

        Raises:
            SingleSamplesNeeded: if the layer's rows are not those of the samples in their order, if they cannot be
                matched to the tokens and some tokens do not count, or if they match two sequences of which different
                tokens count.
        """
        is_flat = len(leading_shape) == 1 or self.num_samples == 1
        masks = [
            (mask, kept)
            for number, (mask, kept) in enumerate(zip(self.masks, self._kept, strict=True))
            if sequences is None or number in sequences
        ]
        for matches in (
            lambda mask: _without_ones(mask.shape) == _without_ones(leading_shape),
            lambda mask: is_flat and mask.numel() == leading_shape.numel(),
        ):
            found = [kept for mask, kept in masks if matches(mask)]
            if any(not _same(kept, found[0]) for kept in found[1:]):
                raise SingleSamplesNeeded(
                    f"the rows of {layer}, {list(leading_shape)}, could be those of either of the model's sequences"
                )
            if found:
                return found[0]
        if not is_flat and leading_shape[0] % self.num_samples:
            raise SingleSamplesNeeded(
                f"some rows are not those of one sample after another ({list(leading_shape)} in {layer})"
            )
        if self.masks_other_modality and self.num_samples > 1 and self._kept[0] is not None:
            raise SingleSamplesNeeded(
                f"the attention mask is of another sequence than the layers' rows ({list(self.masks[0].shape)}, and "
                f"{list(leading_shape)} in {layer})"
            )
        all_labelled = self.num_labelled == self.num_samples
        if all(kept is None for kept in self._kept) or (self.other_modality and all_labelled):
            return None
        if self.num_samples in (1, leading_shape.numel()):  # one row a sample, as heads that classify have it
            return None if all_labelled or self.label_counts is None else self.label_counts.nonzero().squeeze(1)
        for mask in self.masks:
            if leading_shape.numel() == len(mask):  # one row a sequence, of which a sample has several
                return mask.any(dim=1).nonzero().squeeze(1)
        shapes = ", ".join(str(list(mask.shape)) for mask in self.masks)
        raise SingleSamplesNeeded(f"the rows of {layer}, {list(leading_shape)}, do not match the token mask {shapes}")

    def routed_rows(
        self, routed: RoutedTokens, *, layer: str, sequences: frozenset[int] | None = None
    ) -> Tensor | None:
        """Do what `rows` does for a layer that is given some of the tokens."""
        kept = self.rows(torch.Size([routed.count]), layer=layer, sequences=sequences)
        if kept is None:
            return None
        counts = torch.zeros(routed.count, dtype=torch.bool, device=routed.indices.device)
        counts[kept.to(counts.device)] = True
        return counts[routed.indices].nonzero().squeeze(1)

    @functools.cached_property
    def _kept(self) -> tuple[Tensor | None, ...]:
        """Indices of the tokens that count, or None for all of them: found once a batch, since it waits for the GPU."""
        return tuple(None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1) for mask in self.masks)

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a label, or of all if labels are unknown."""
        return self.num_samples if self.label_counts is None else int((self.label_counts > 0).sum().item())


def _without_ones(shape: torch.Size) -> list[int]:
    """Return the shape without dimensions of 1 after the first, as heads that are shared have them."""
    return [*shape[:1], *(size for size in shape[1:] if size != 1)]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def read_batch_tokens(
    batch: Mapping[str, Any],
    *,
    shifts_labels: bool,
    encoder_decoder: bool = False,
    token_mask: Literal["attention", "labels"] = "attention",
    num_samples: int | None = None,
) -> BatchTokens:
    """Find the token masks and label counts of a collated batch.

    Samples without a label do not count anywhere: their tokens are masked out.

    Args:
        batch: What the collator made: tensors with the samples in their first dimension.
        shifts_labels: Whether position t predicts label t + 1, as causal language models do.
        encoder_decoder: Whether a decoder reads the labels as a second sequence.
        token_mask: ``"attention"``: tokens that are attended to. ``"labels"``: positions whose prediction is a label;
            of an encoder's sequence those that are attended to.
        num_samples: Samples in the batch, each of which may be several rows; None: one for each row.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        labels = None
    predicted = _predicted_positions(batch, labels, shifts_labels)
    counts = None if predicted is None else predicted.reshape(predicted.shape[0], -1).sum(dim=1)
    attended = _attended_positions(batch, labels if encoder_decoder else None)
    if token_mask == "labels" and predicted is not None and predicted.dim() == 2:
        masks = (*attended[:-1], predicted) if encoder_decoder else (predicted,)  # the encoder predicts nothing
    else:
        masks = attended
    if counts is not None:
        masks = tuple(_of_labelled(mask, counts > 0, batch) for mask in masks)
    return BatchTokens(
        num_samples=num_rows(batch) if num_samples is None else num_samples,
        label_counts=_by_sample(counts, num_samples),
        num_labels=None if counts is None else int(counts.sum().item()),
        masks=masks,
        other_modality=any(name.startswith(_OTHER_MODALITIES) for name in batch),
        masks_other_modality=_masks_other_modality(batch),
    )


def tell_sequences_apart(batch: Mapping[str, Any], longest: int) -> Mapping[str, Any]:
    """Pad the decoder's sequence by one position, if it is as long as the encoder's and other tokens of it count.

    Layers' rows are told by their number. What is added has no label, and no other position attends to it. A batch with
    anything else than tokens, masks and labels is left alone, since that may have to be as long as the labels.

    Args:
        batch: For the model's own loss, if its decoder reads the labels.
        longest: How long these may be made.
    """
    labels, known = batch.get("labels"), ("input_ids", "attention_mask", "labels", *_OF_DECODER)
    if labels is None or any(name not in known or not _is_sequences(value) for name, value in batch.items()):
        return batch
    if labels.shape[1] >= longest:
        return batch
    masks = _attended_positions(batch, labels)
    if len(masks) < 2 or masks[0].shape != masks[1].shape or torch.equal(*masks):
        return batch
    longer = {name: torch.nn.functional.pad(batch[name], (0, 1)) for name in _OF_DECODER if name in batch}
    return {**batch, **longer, "labels": torch.nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)}


def _is_sequences(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _masks_other_modality(batch: Mapping[str, Any]) -> bool:
    """Tell by its length, in a batch without tokens, whether the mask ``[B, S]`` is one of audio or images."""
    attention = batch.get("attention_mask")
    if not isinstance(attention, Tensor) or attention.dim() != 2 or "input_ids" in batch:
        return False
    return any(
        isinstance(value, Tensor) and name.startswith(_OTHER_MODALITIES) and attention.shape[1] in value.shape[1:]
        for name, value in batch.items()
    )


def _of_labelled(mask: Tensor, labelled: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Mask out the sequences of samples that are not ``labelled [B]``, where they can be told."""
    if _has_choices(batch):
        labelled = labelled.repeat_interleave(max(1, mask.shape[0] // len(labelled)))
    return mask & labelled[:, None] if len(mask) == len(labelled) else mask


def _has_choices(batch: Mapping[str, Any]) -> bool:
    """Tell whether each sample is several sequences, ``[B, C, S]``, which models of multiple choice run one by one."""
    ids = batch.get("input_ids")
    return isinstance(ids, Tensor) and ids.dim() == 3


def _by_sample(counts: Tensor | None, num_samples: int | None) -> Tensor | None:
    """Return the labels of each sample, if they can be told from those of the rows ``[R]``."""
    if counts is None or num_samples is None or counts.shape[0] == num_samples:
        return counts
    return counts.sum(dim=0, keepdim=True) if num_samples == 1 else None


def num_rows(batch: Mapping[str, Any]) -> int:
    """Return the length of the first dimension of a batch."""
    for name in ("input_ids", "labels", "attention_mask", "inputs_embeds", "pixel_values", "input_features"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].shape[0]
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 1


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch of one sample is a row of several sequences, by its positions or sequence lengths."""
    lengths = batch.get("cu_seq_lens_q", batch.get("seq_lengths"))
    if isinstance(lengths, Tensor):
        return lengths.numel() > (2 if "cu_seq_lens_q" in batch else 1)
    positions = batch.get("position_ids")
    return (
        isinstance(positions, Tensor) and positions.dim() == 2 and int((positions == 0).sum().item()) > len(positions)
    )


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
    attention = batch.get("attention_mask")
    ids = batch.get("input_ids")
    if isinstance(attention, Tensor) and attention.dim() == 2:
        found.append(attention.bool())
    elif isinstance(ids, Tensor):
        mask = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(attention, Tensor) and attention.shape == ids.shape:
            mask = attention.bool()
        found.append(mask.flatten(0, 1) if mask.dim() == 3 else mask)
    decoder = batch.get("decoder_attention_mask")
    if isinstance(decoder, Tensor) and decoder.dim() == 2:
        found.append(decoder.bool())
    elif read_labels is not None and read_labels.dim() == 2:
        found.append(read_labels != IGNORED_LABEL)
    return tuple(found)
