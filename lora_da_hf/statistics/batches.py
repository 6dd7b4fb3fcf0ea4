"""How samples are put together in batches, which are unlike each other, and what a single one is."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.errors import DataError
from lora_da_hf.statistics.token_masks import read_batch_tokens

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]

_LITTLE_PADDING = 16
_MOST_UNLIKE = 4
_MOST_TARGETS = 4096
_INPUTS = ("input", "attention_mask", "token_type_ids", "position_ids", "pixel_values", "audio")
"""Beginnings of the names of what a model reads and no loss compares with."""


def batches_by_length(samples: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batch samples of similar length, so that none is padded by more than a quarter of its length, or 16 tokens."""
    batches: list[list[Any]] = []
    for sample in sorted(samples, key=sample_length, reverse=True):
        last = batches[-1] if batches else []
        length = sample_length(sample)
        if last and len(last) < batch_size and sample_length(last[0]) <= length + max(length // 4, _LITTLE_PADDING):
            last.append(sample)
        else:
            batches.append([sample])
    return batches


def whole_batches(samples: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batch samples for a loss that needs them together: none is left alone, so two may become three."""
    most = len(samples) if batch_size == 1 else len(samples) // 2
    number = max(1, min(-(-len(samples) // batch_size), most))
    ends = [len(samples) * k // number for k in range(number + 1)]
    return [list(samples[start:end]) for start, end in itertools.pairwise(ends) if end > start]


def sample_length(sample: Any) -> int:
    """Return the number of tokens of a sample, or 0 if it has no ``input_ids``."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None and hasattr(ids, "__len__") else 0


def digest_sample(batch: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the tensors of a batch of one sample, by name and content."""
    digest = hashlib.sha256()
    for name, value in sorted(named_tensors(batch), key=operator.itemgetter(0)):
        digest.update(f"{name}:{value.dtype}:{list(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_lengths(samples: Sequence[Any], collate: Collate, limit: int | None) -> None:
    """Verify that no sample is longer than the model allows, once the collator had the chance to truncate it."""
    sample = max(samples, key=sample_length, default=None)
    if limit is None or sample_length(sample) <= limit:
        return
    ids = collate([sample]).get("input_ids")
    longest = ids.shape[-1] if isinstance(ids, Tensor) else sample_length(sample)
    if longest > limit:
        raise DataError(
            f"A sample has {longest} tokens and the model allows {limit} (max_position_embeddings). Truncate samples "
            f"to {limit} tokens when you tokenise them."
        )


def choose_unlike(samples: Sequence[Any], collate: Collate, *, shifts_labels: bool) -> list[Any]:
    """Return the shortest sample and up to three that differ from it and each other in length, labels and targets."""
    lengths, traits = zip(*(_describe(collate([sample]), shifts_labels) for sample in samples), strict=True)
    first, *left = sorted(range(len(samples)), key=lengths.__getitem__)
    chosen = [first]

    def news(number: int) -> int:
        """Count in how many respects a sample is unlike all those that were chosen."""
        length, known = lengths[number], set[tuple[str, float]]().union(*(traits[other] for other in chosen))
        is_far = all(2 * abs(length - lengths[other]) > min(length, lengths[other]) for other in chosen)
        return is_far + len({name for name, _ in traits[number] - known})

    while left and len(chosen) < _MOST_UNLIKE:
        best = max(left, key=news)
        left.remove(best)
        chosen.append(best)
    return [samples[number] for number in chosen]


def _describe(batch: Mapping[str, Any], shifts_labels: bool) -> tuple[float, set[tuple[str, float]]]:
    """Return the length of a sample, in numbers if it has no tokens, and what tells it from others."""
    tokens = read_batch_tokens(batch, shifts_labels=shifts_labels, num_samples=1)
    tensors = list(named_tensors(batch))
    targets = [(name, tensor) for name, tensor in tensors if not name.startswith(_INPUTS)]
    length = max((float(mask.sum()) for mask in tokens.masks), default=float(sum(t.numel() for _, t in tensors)))
    traits = {("length", length), ("size of targets", float(sum(tensor.numel() for _, tensor in targets)))}
    if tokens.num_labels is not None:
        traits.add(("number of labels", tokens.num_labels))
    for name, tensor in targets:
        values: list[float] = tensor.detach().flatten()[:_MOST_TARGETS].double().tolist()
        traits.update((f"target {name}", value) for value in values)
    return length, traits


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch with their names, also those in lists and dictionaries."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        inside: Mapping[Any, Any] = value
        for key, item in inside.items():
            yield from named_tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in list[Any](value):
            yield from named_tensors(item, name)


def draws_at_random(collate: Collate, samples: Sequence[Any]) -> bool:
    """Tell whether a collator makes another batch each time, as one that masks tokens does."""
    return digest_sample(collate(samples)) != digest_sample(collate(samples))
