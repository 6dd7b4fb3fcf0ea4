"""What the statistics and the solve take in memory, and how the layers are spread over passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_da_hf.distributed.processes import balanced_owners
from lora_da_hf.errors import PlanError
from lora_da_hf.theory.solve import solve_dtype

_ITEM = 4
"""Bytes of an entry of the sums, which are in float32."""
_SMALL_WORK = 2**28
"""Bytes up to which a group is solved on one thread: its matrices are too small to be shared by several."""
_MOST_SOLVERS = 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are fed the same tensor, which are summed and solved together; the leader is the first.

    ``device`` is the number of the device that their sums live on, in the order of the layers.
    """

    members: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]
    device: int = 0

    @property
    def leader(self) -> str:
        """The layer whose input is summed."""
        return self.members[0]

    @property
    def weights(self) -> int:
        """Entries of the members' weights."""
        return self.d_in * sum(self.d_outs)

    @property
    def sum_bytes(self) -> int:
        """Size of the sums."""
        return _ITEM * (self.d_in**2 + self.weights + sum(self.d_outs))

    @property
    def work_bytes(self) -> int:
        """What the solve takes beside the sums, in its dtype: the moment three times, and a gradient four times."""
        return solve_dtype(self.d_in).itemsize * self.d_in * (3 * self.d_in + 4 * max(self.d_outs))

    @property
    def solve_cost(self) -> float:
        """Arithmetic of the solve: a Cholesky factor, and for each member the solves and the eigenvectors."""
        return self.d_in**3 / 3 + 4 * self.d_in * self.weights


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What has to be done; ``threads`` are those of a process's CPU, or 1 where another device solves."""

    groups: tuple[Group, ...]
    num_samples: int
    threads: int = 1

    @property
    def small(self) -> bool:
        """Whether each group is solved on one thread: a matter of sizes alone, so that the bits are too."""
        return all(group.work_bytes <= _SMALL_WORK for group in self.groups)

    @property
    def solvers(self) -> int:
        """How many groups a process solves at the same time."""
        return min(self.threads, _MOST_SOLVERS) if self.small else 1

    def peak_bytes(self, groups: Iterable[Group]) -> dict[int, int]:
        """Return what collecting and solving some groups at once takes at most, by device."""
        sums: dict[int, int] = {}
        work: dict[int, list[int]] = {}
        for group in groups:
            sums[group.device] = sums.get(group.device, 0) + group.sum_bytes
            work.setdefault(group.device, []).append(group.work_bytes)
        return {device: size + sum(sorted(work[device])[-self.solvers :]) for device, size in sums.items()}

    def fits(self, groups: Iterable[Group], budget: Mapping[int, float]) -> bool:
        """Tell whether some groups can be collected and solved at once."""
        return all(size <= budget[device] for device, size in self.peak_bytes(groups).items())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which layers are collected in which pass, and who solves them. The processes share the samples of each pass.

    Attributes:
        windows: Leaders of the groups that are collected in each pass.
        sample_passes: Forward and backward passes of one sample that the busiest process makes.
        peak_bytes: What the sums and the solve take at most, on one device of one process.
        solvers: How many groups a process solves at the same time, each on one thread if ``one_thread_each``.
    """

    windows: tuple[tuple[str, ...], ...]
    owners: dict[str, int]
    num_processes: int
    sample_passes: int
    peak_bytes: int
    solvers: int = 1
    one_thread_each: bool = False

    def describe(self) -> str:
        """Say in a line what will be done."""
        count, number = self.num_processes, len(self.windows)
        who = "one process" if count == 1 else f"{count} processes"
        passes = "one pass" if number == 1 else f"{number} passes"
        return (
            f"{who}, {passes}, {self.sample_passes} samples{' each' * (count > 1)}; at most "
            f"{gibibytes(self.peak_bytes)} for sums and solve on a device"
        )


def make_plan(
    work: Workload, *, num_processes: int = 1, budget: Mapping[int, float], solve_alone: bool = False
) -> Plan:
    """Cut the groups into as few passes as fit into the memory, and share their solves.

    Args:
        budget: Bytes that the sums and the solve may take in a process, by number of the device.
        solve_alone: Whether the first process gets all the sums.

    Raises:
        PlanError: if a group does not fit alone.
    """
    one_by_one = dataclasses.replace(work, threads=1)
    _check_fits(one_by_one, budget)
    windows = _windows(work, budget)
    if len(windows) > 1:  # where memory is short, another pass is dearer than solving one after the other
        work = one_by_one
        windows = _windows(work, budget)
    owners: dict[str, int] = {}
    for window in windows:  # all processes solve at the same time, after each window
        costs = {group.leader: group.solve_cost for group in window}
        owners |= balanced_owners(costs, 1 if solve_alone else num_processes)
    share = -(-work.num_samples // num_processes)
    return Plan(
        windows=tuple(tuple(group.leader for group in window) for window in windows),
        owners=owners,
        num_processes=num_processes,
        sample_passes=share * len(windows),
        peak_bytes=max(max(work.peak_bytes(window).values()) for window in windows),
        solvers=work.solvers,
        one_thread_each=work.small,
    )


def _windows(work: Workload, budget: Mapping[int, float]) -> list[list[Group]]:
    windows: list[list[Group]] = []
    for group in work.groups:
        if windows and work.fits([*windows[-1], group], budget):
            windows[-1].append(group)
        else:
            windows.append([group])
    return windows


def _check_fits(work: Workload, budget: Mapping[int, float]) -> None:
    """Raise PlanError if a group does not fit alone, naming the largest."""
    too_large = [group for group in work.groups if not work.fits([group], budget)]
    if too_large:
        largest = max(too_large, key=lambda group: group.sum_bytes + group.work_bytes)
        needed = largest.sum_bytes + largest.work_bytes
        raise PlanError(
            f"The statistics do not fit: {', '.join(largest.members)} (input {largest.d_in}) take {gibibytes(needed)}, "
            f"and there are {gibibytes(budget[largest.device])}. Set memory_budget to at least {needed} bytes, free "
            "memory on the device, or leave these layers out of target_modules."
        )


def gibibytes(size: float) -> str:
    """Return a size for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
