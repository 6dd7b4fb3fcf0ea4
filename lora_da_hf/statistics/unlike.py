"""A few samples that are unlike each other, to measure on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.statistics.token_masks import read_batch_tokens

Collate = Callable[[Sequence[Any]], Mapping[str, Any]]
"""Makes a batch, on the model's device, of a list of samples."""

Traits = dict[str, set[float]]
"""What tells a sample from others: numbers by name."""

_AT_MOST = 4
_MOST_TARGETS = 4096
_INPUTS = ("input", "attention_mask", "token_type_ids", "position_ids", "pixel_values", "audio")
"""Beginnings of the names of what a model reads and no loss compares with."""


def choose_unlike(samples: Sequence[Any], collate: Collate, *, shifts_labels: bool) -> list[Any]:
    """Return the shortest sample and up to three that differ from it and each other, the shortest such.

    They differ in length, number of labels, and whatever else is compared with the model's outputs, as far as any do.
    """
    described = [_describe(collate([sample]), shifts_labels) for sample in samples]
    first, *left = sorted(range(len(samples)), key=lambda number: max(described[number]["tokens"]))
    chosen = [first]
    while left and len(chosen) < _AT_MOST:
        known = [described[number] for number in chosen]
        best = max(left, key=lambda number: _news(described[number], known))
        left.remove(best)
        chosen.append(best)
    return [samples[number] for number in chosen]


def _describe(batch: Mapping[str, Any], shifts_labels: bool) -> Traits:
    """Return the traits of a batch of one sample. Without tokens, its length is the size of all that is in it."""
    tokens = read_batch_tokens(batch, shifts_labels=shifts_labels, num_samples=1)
    tensors = list(named_tensors(batch))
    targets = [(name, tensor) for name, tensor in tensors if not name.startswith(_INPUTS)]
    lengths = [float(mask.sum()) for mask in tokens.masks] or [float(sum(tensor.numel() for _, tensor in tensors))]
    traits: Traits = {
        "tokens": {max(lengths)},
        "number of labels": set() if tokens.num_labels is None else {tokens.num_labels},
        "size of targets": {sum(tensor.numel() for _, tensor in targets)},
    }
    for name, tensor in targets:
        values: list[float] = tensor.detach().flatten()[:_MOST_TARGETS].double().tolist()
        traits.setdefault(f"target {name}", set()).update(values)
    return traits


def _news(traits: Traits, known: Sequence[Traits]) -> int:
    """Return in how many respects a sample is unlike all of the others."""
    (length,) = traits["tokens"]
    lengths = [number for other in known for number in other["tokens"]]
    is_far = all(2 * abs(length - other) > min(length, other) for other in lengths)
    news = (not values <= set[float]().union(*(other.get(n, ()) for other in known)) for n, values in traits.items())
    return is_far + sum(news)


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
    first, second = ([tensor for _, tensor in named_tensors(collate(samples))] for _ in range(2))
    alike = len(first) == len(second) and all(a.shape == b.shape for a, b in zip(first, second, strict=True))
    return not alike or not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
