"""Labels drawn from the model's own distribution, which make the second moment of gradients the Fisher information."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.errors import StatisticsError
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.token_masks import IGNORED_LABEL, SingleSamplesNeeded

_SAME_LOSS = 2e-2


class SampledLabels:
    """Draws labels in the place of those that count, from the softmax of the logits that predict them.

    Each sample has random numbers of its own, which follow from the seed and its place among the samples. So the labels
    depend neither on the batch size nor on the number of processes, as far as the logits do not.

    Args:
        samples: All samples of the statistics, of all processes. They are told apart by identity.
        seed: Of the random numbers.
        shifts_labels: Whether position t predicts label t + 1.
    """

    def __init__(self, samples: Sequence[Any], *, seed: int, shifts_labels: bool) -> None:
        self._samples = samples  # as long as they live, no other object has their ids
        self._places = {id(sample): place for place, sample in enumerate(samples)}
        self._seed = seed
        self._shifts_labels = shifts_labels

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Run the model without gradients, and return its logits."""
        return _logits(model, batch)

    def draw(self, batch: Mapping[str, Any], samples: Sequence[Any], logits: Tensor) -> dict[str, Any]:
        """Return the batch with drawn labels.

        Args:
            batch: What the collator made of the samples.
            samples: Those of the batch, in its order.
            logits: What `logits` returned for the batch.

        Raises:
            SingleSamplesNeeded: if the rows of the batch are not those of its samples.
        """
        rows = batch["labels"].shape[0]
        if rows % len(samples):
            raise SingleSamplesNeeded(f"the collator makes {rows} rows of {len(samples)} samples")
        drawn = batch["labels"].clone()
        targets, scores = _aligned(drawn, logits, self._shifts_labels)
        numbers = [random.Random(f"{self._seed}/{self._places[id(sample)]}") for sample in samples]
        for row in range(rows):
            counts = targets[row] != IGNORED_LABEL
            generator = numbers[row * len(samples) // rows]
            uniform = [generator.random() for _ in range(int(counts.sum().item()))]
            if uniform:
                found = _inverse_cdf(scores[row][counts.to(scores.device)], uniform).to(targets)
                targets[row] = targets[row].masked_scatter(counts, found)
        return {**batch, "labels": drawn}


def check_labels_can_be_sampled(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: float,
    *,
    shifts_labels: bool,
    encoder_decoder: bool,
    in_step: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Verify that the loss of a sample is the cross-entropy of the model's logits, so that labels can be drawn.

    Args:
        model: The model.
        batch: Of one sample that has a label.
        loss: Its loss.
        shifts_labels: Whether position t predicts label t + 1.
        encoder_decoder: Whether a decoder reads the labels.
        in_step: Makes a block in which several processes wait for each other, to run the model in.

    Raises:
        StatisticsError: if it is another loss, or the labels are an input too.
    """
    advice = 'Use fisher="empirical".'
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        found = "none" if labels is None else f"{getattr(labels, 'dtype', type(labels).__name__)}"
        raise StatisticsError(f'fisher="sampled" draws labels that are classes, and the labels are {found}. {advice}')
    if isinstance(batch.get("shift_labels"), Tensor):
        raise StatisticsError(f'fisher="sampled" draws labels, and the batch has shift_labels too. {advice}')
    if encoder_decoder and "decoder_input_ids" not in batch:
        raise StatisticsError(
            'fisher="sampled" would change what the decoder reads, which it makes of the labels. Give '
            f"decoder_input_ids in the samples. Or: {advice}"
        )
    with in_step():
        logits = _logits(model, batch)
    targets, scores = _aligned(labels.to(logits.device), logits, shifts_labels)
    expected = nn.functional.cross_entropy(
        scores.float().reshape(-1, scores.shape[-1]), targets.reshape(-1), ignore_index=IGNORED_LABEL
    ).item()
    if not math.isclose(loss, expected, rel_tol=_SAME_LOSS):
        raise StatisticsError(
            f'fisher="sampled" needs a loss that is the cross-entropy of the logits: on the first sample the loss is '
            f"{loss:.4g} and the cross-entropy {expected:.4g}. {advice}"
        )


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), without_checkpointing(model):
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise StatisticsError('fisher="sampled" needs a model that returns logits. Use fisher="empirical".')
    return logits


def _aligned(labels: Tensor, logits: Tensor, shifts_labels: bool) -> tuple[Tensor, Tensor]:
    """Return views of the labels and of the logits that predict them, ``[B, ...]`` and ``[B, ..., classes]``."""
    if shifts_labels and labels.dim() == 2:
        labels, logits = labels[:, 1:], logits[:, :-1]
    if logits.shape[:-1] != labels.shape:
        raise StatisticsError(
            f'fisher="sampled": logits {list(logits.shape)} do not predict labels {list(labels.shape)}. Use '
            'fisher="empirical".'
        )
    return labels, logits


def _inverse_cdf(scores: Tensor, uniform: list[float]) -> Tensor:
    """Draw a class from the softmax of each row of ``scores``, given a uniform number for each."""
    scores = scores.reshape(len(uniform), -1)
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    numbers = torch.tensor(uniform, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, numbers, right=True).clamp_max(scores.shape[-1] - 1).squeeze(-1)
