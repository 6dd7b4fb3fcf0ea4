"""The few collective operations that an initialisation needs, and the sums of the pass that they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_da_hf.errors import ConfigError
from lora_da_hf.records import LayerStatistics, UpperTriangle
from lora_da_hf.statistics.taps import Taps

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

    def all_sum_(self, tensor: Tensor) -> None:
        """Sum ``tensor`` over the processes, in place on all of them."""
        if self.count > 1:
            dist.all_reduce(tensor)

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


def sum_counts(taps: Taps, processes: Processes) -> None:
    """Give the taps on every process the counts of all processes."""
    for name in ("num_tokens", "forward_calls", "backward_calls"):
        everywhere = processes.gather([getattr(tap, name) for tap in taps.taps.values()])
        for tap, counts in zip(taps.taps.values(), zip(*everywhere, strict=True), strict=True):
            setattr(tap, name, sum(counts))


def reduce_statistics(
    taps: Taps, owners: Mapping[str, int], processes: Processes, *, num_samples: int, num_items: int
) -> dict[str, dict[str, LayerStatistics]]:
    """Sum each group of layers over the processes, and return the means of those that this process owns, by leader."""
    per_sample = num_items / num_samples if num_samples else 1.0
    statistics: dict[str, dict[str, LayerStatistics]] = {}
    for leader, members in taps.groups.items():
        owner, moment, num_inputs = owners[leader], members[0].input_moment, members[0].num_tokens
        processes.reduce_sum_(moment.entries, owner)
        processes.reduce_sum_(members[0].input_sum, owner)
        moment.entries.div_(max(num_inputs, 1))
        mean = members[0].input_sum / max(num_inputs, 1)
        for tap in members:
            processes.reduce_sum_(tap.squares, owner)
            processes.reduce_sum_(tap.weight_grad, owner)
            if processes.index == owner:
                statistics.setdefault(leader, {})[tap.name] = LayerStatistics(
                    input_second_moment=moment,
                    output_grad_second_moment_diag=tap.squares.div_(max(tap.num_tokens, 1) * per_sample**2),
                    weight_grad=tap.weight_grad.div_(max(num_items, 1)),
                    num_input_tokens=num_inputs,
                    num_output_tokens=tap.num_tokens,
                    input_mean=mean,
                )
            tap.squares = tap.weight_grad = torch.empty(0)
            tap.input_moment = UpperTriangle(entries=tap.squares, width=0, block=1)
    return statistics
