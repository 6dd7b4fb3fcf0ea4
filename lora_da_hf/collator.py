"""A collator whose batches are on a device, and that leaves samples and random generators as they are."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from lora_da_hf.errors import DataError

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

RawCollate = Callable[[list[Any]], Mapping[str, Any]]


def _copied(sample: Any) -> Any:
    """Copy what a collator may pad or pop in place: mappings and lists, but neither tensors nor images."""
    if not isinstance(sample, list | MutableMapping):
        return sample
    copied: Any = copy.copy(sample)
    for place, value in sample.items() if isinstance(sample, MutableMapping) else enumerate(sample):
        if isinstance(value, list | MutableMapping):
            copied[place] = _copied(value)
    return copied


class DeviceCollator:
    """A collator whose tensors are on a device, and that leaves the samples as they are: it gets copies of them."""

    def __init__(self, collate: RawCollate, device: Any) -> None:
        self._collate = collate
        self.device = device

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch."""
        batch: Any = self._collate([_copied(sample) for sample in samples])
        if not isinstance(batch, Mapping):
            raise DataError(
                f"The data collator made a {type(batch).__name__}; it must make a mapping of tensors. A "
                "DataLoader without a batch_size has none: give samples and a data_collator."
            )
        return {name: send_to_device(value, self.device) for name, value in batch.items()}

    @contextlib.contextmanager
    def generators_kept(self) -> Generator[None]:
        """Give the collator copies of the random generators that it has as attributes, and take them back at the end.

        Those that it makes meanwhile, as at its first call, are taken away.
        """
        holder = _innermost(self._collate)
        before = dict(getattr(holder, "__dict__", {}))
        for name, generator in _generators(holder).items():
            setattr(holder, name, copy.deepcopy(generator))
        try:
            yield
        finally:
            for name in _generators(holder):
                if name in before:
                    setattr(holder, name, before[name])
                else:
                    delattr(holder, name)


def _innermost(collate: Any) -> Any:
    """Return the object that a collator keeps its attributes in, without what Trainer or a partial puts around it."""
    while True:
        if isinstance(collate, functools.partial):
            collate = collate.func  # pyright: ignore[reportUnknownMemberType]
        elif callable(getattr(collate, "data_collator", None)):  # of Trainer's RemoveColumnsCollator
            collate = collate.data_collator
        else:
            return getattr(collate, "__self__", collate)


def _generators(holder: Any) -> dict[str, Any]:
    attributes = getattr(holder, "__dict__", {})
    return {name: value for name, value in attributes.items() if isinstance(value, _GENERATORS)}
