"""How samples are put together in batches, and what a single one is."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.errors import DataError
from lora_da_hf.statistics.unlike import Collate, named_tensors

_LITTLE_PADDING = 16


@dataclass(frozen=True, kw_only=True)
class Lockstep:
    """What makes several processes run the same number of batches, as partitioned parameters demand.

    Attributes:
        most: Returns the largest of the numbers that the processes give it.
        filler: A sample to run where a process has none left. It counts for nothing.
        alike: Makes a block that raises `SingleSamplesNeeded` on all processes if it does on one.
    """

    most: Callable[[int], int]
    filler: Any
    alike: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of_one(cls) -> Lockstep:
        """Return that of a process which nobody waits for."""
        return cls(most=lambda number: number, filler=None, alike=contextlib.nullcontext)

    @property
    def runs_what_does_not_count(self) -> bool:
        """Whether a batch that counts for nothing is run, since other processes run one meanwhile."""
        return self.filler is not None

    def batches(self, own: Sequence[list[Any]]) -> Iterator[tuple[list[Any], bool]]:
        """Yield this process's batches, then fillers until every process is done; and whether they count."""
        for number in range(self.most(len(own))):
            yield (own[number], True) if number < len(own) else ([self.filler], False)


def batches_by_length(samples: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batch samples of similar length together: it saves padding, and the order does not matter.

    No sample is padded by more than a quarter of its length, or 16 tokens, so a batch may be smaller than asked.
    """
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
    number = -(-len(samples) // batch_size)
    if batch_size > 1 and len(samples) < 2 * number:
        number = max(1, number - 1) if samples else 0
    ends = [len(samples) * k // number for k in range(number + 1)] if number else [0]
    return [list(samples[start:end]) for start, end in itertools.pairwise(ends)]


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
