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
    """A collator whose tensors are on a device, and that leaves the samples as they are.

    Args:
        collate: Makes a batch of a list of samples, which it may change in place: they are copied, with the lists and
            mappings in them.
        device: Where the tensors go.
    """

    def __init__(self, collate: RawCollate, device: Any) -> None:
        self._collate = collate
        self._device = device

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch.

        Raises:
            DataError: if it is not a mapping.
        """
        batch: Any = self._collate([_copied(sample) for sample in samples])
        if not isinstance(batch, Mapping):
            raise DataError(
                f"The data collator made a {type(batch).__name__}; it must make a mapping of tensors. A "
                "DataLoader without a batch_size has none: give samples and a data_collator."
            )
        return {name: send_to_device(value, self._device) for name, value in batch.items()}

    @contextlib.contextmanager
    def generators_kept(self) -> Generator[None]:
        """Put back the random generators that the collator has as attributes: it may make them at its first call."""
        holder = _innermost(self._collate)
        before = {name: (value, _state(value)) for name, value in _attributes(holder)}
        try:
            yield
        finally:
            for name, value in _attributes(holder):
                if _state(value) is None:
                    continue
                if name not in before:
                    delattr(holder, name)
                    continue
                first, state = before[name]
                if value is not first:
                    setattr(holder, name, first)
                if state is not None:
                    _set_state(first, state)


def _innermost(collate: Any) -> Any:
    """Return the object that a collator keeps its attributes in, without what Trainer or a partial puts around it."""
    while True:
        if isinstance(collate, functools.partial):
            collate = collate.func  # pyright: ignore[reportUnknownMemberType]
        elif callable(getattr(collate, "data_collator", None)):  # of Trainer's RemoveColumnsCollator
            collate = collate.data_collator
        else:
            return getattr(collate, "__self__", collate)


def _attributes(holder: Any) -> list[tuple[str, Any]]:
    return list(getattr(holder, "__dict__", {}).items())


def _state(generator: Any) -> Any:
    """Return the state of a random generator, or None of anything else."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
