"""The few collective operations that an initialisation needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from lora_da_hf.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that share the work. With one process every operation does nothing."""

    index: int
    count: int

    @classmethod
    def current(cls) -> Processes:
        """Return the processes of the default process group, or this one alone without a group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of the items: every count-th, from its index on."""
        return list(items[self.index :: self.count])

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in order, on all of them: small objects, since they are pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over the processes, the same bits on all of them."""
        return [sum(column) for column in zip(*self.gather(tuple(values)), strict=True)]

    def reduce_sum_(self, tensor: Tensor, owner: int) -> None:
        """Sum ``tensor`` over the processes into the owner's, in place; the others' is then undefined."""
        if self.count > 1:
            dist.reduce(tensor, dst=owner)

    def broadcast(self, value: T, source: int) -> T:
        """Return the source's value on every process: it is pickled, with tensors on the CPU."""
        if self.count == 1:
            return value
        values: list[Any] = [value if self.index == source else None]
        dist.broadcast_object_list(values, src=source)
        return values[0]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError on all processes if one has other facts, naming what differs."""
        first, *others = self.gather(dict(facts))
        for index, other in enumerate(others, start=1):
            names = [name for name in dict.fromkeys((*first, *other)) if first.get(name) != other.get(name)]
            if names:
                raise ConfigError(
                    f"The processes differ in {', '.join(names)}: process 0 has {names[0]}={first.get(names[0])!r}, "
                    f"and process {index} has {other.get(names[0])!r}. Give all processes the same."
                )


def balanced_owners(costs: dict[str, float], count: int) -> dict[str, int]:
    """Assign items to processes so that the largest total cost is small: costliest first, to the least loaded."""
    load = [0.0] * count
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owners[name] = min(range(count), key=load.__getitem__)
        load[owners[name]] += costs[name]
    return owners
