"""What the statistics and the solve will take, in memory and arithmetic, and how they are spread over passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_da_hf.distributed.processes import balanced_owners
from lora_da_hf.errors import PlanError
from lora_da_hf.theory.solve import solve_dtype

_GIB = 2**30
_SOLVE_SPEED = 0.11
"""Speed of the solve, in float64, as a part of the pass's: measured on a CPU, see benchmarks/results."""
_SMALL_WORK = 2**28
"""Bytes up to which a group is solved on one thread: its matrices are too small to be shared by several."""
_MOST_SOLVERS = 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are fed the same tensor, which are summed and solved together.

    Attributes:
        members: Their names, the leader first.
        d_in: Width of what they are fed.
        d_outs: Width of what each puts out.
        device: Number of the device that their sums live on, in the order of the layers.
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

    def sum_bytes(self, itemsize: int) -> int:
        """Return the size of the sums."""
        return itemsize * (self.d_in**2 + self.weights + sum(self.d_outs))

    @property
    def work_bytes(self) -> int:
        """What the solve takes beside the sums, in its dtype: the moment three times, and a gradient four times."""
        return solve_dtype(self.d_in).itemsize * self.d_in * (3 * self.d_in + 4 * max(self.d_outs))

    def sent_bytes(self, itemsize: int) -> int:
        """Return what a process that does not own the group sends: the input moment as a triangle."""
        return itemsize * (self.d_in * (self.d_in + 1) // 2 + self.weights + sum(self.d_outs))

    @property
    def pass_flops(self) -> float:
        """What the sums cost for a token: all of ``g x^T`` and half of ``x x^T``."""
        return 2.0 * self.weights + self.d_in**2

    @property
    def solve_flops(self) -> float:
        """What the solve costs: a Cholesky factor, and for each member the solves and the eigenvectors."""
        return self.d_in**3 / 3 + 4 * self.d_in * self.weights


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What has to be done, whoever does it.

    Attributes:
        groups: All layers, in the order in which they are called.
        weights: Entries of all the weights that a token is multiplied with, those of other layers included.
        num_samples: Samples of the statistics.
        num_tokens: Their tokens.
        itemsize: Bytes of an entry of the sums.
        checkpointing: Whether the backward pass runs the forward pass again.
        threads: Of a process's CPU; 1 where layers are solved on another device.
    """

    groups: tuple[Group, ...]
    weights: int
    num_samples: int
    num_tokens: int
    itemsize: int = 4
    checkpointing: bool = False
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
            sums[group.device] = sums.get(group.device, 0) + group.sum_bytes(self.itemsize)
            work.setdefault(group.device, []).append(group.work_bytes)
        return {device: size + sum(sorted(work[device])[-self.solvers :]) for device, size in sums.items()}

    def pass_flops(self, leaders: Iterable[str]) -> float:
        """Return the arithmetic for a token of a pass that collects some groups.

        The backward pass ends at the first of them, unless it runs the forward pass again.
        """
        wanted = set(leaders)
        collected = [group for group in self.groups if group.leader in wanted]
        if not collected:
            return 0.0
        before = self.groups[: self.groups.index(collected[0])]
        reached = self.weights - sum(group.weights for group in before)
        backward = 4.0 * self.weights if self.checkpointing else 2.0 * reached
        return 2.0 * self.weights + backward + sum(group.pass_flops for group in collected)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who collects and solves which layers when.

    Attributes:
        windows: Leaders of the groups that are collected in each pass.
        owners: The process that solves each group.
        num_processes: How many processes there are.
        sample_passes: Forward and backward passes of one sample that the busiest process makes.
        peak_bytes: What the sums and the solve take at most, on one device of one process.
        sent_bytes: Sums that a process sends, at most.
        pass_flops: Arithmetic of the busiest process in the passes.
        solve_flops: Arithmetic of the busiest process in the solve.
        solvers: How many groups a process solves at the same time.
        one_thread_each: Whether a group is solved on one thread.
    """

    windows: tuple[tuple[str, ...], ...]
    owners: dict[str, int]
    num_processes: int
    sample_passes: int
    peak_bytes: int
    sent_bytes: int
    pass_flops: float
    solve_flops: float
    solvers: int = 1
    one_thread_each: bool = False

    def seconds(self, flops_per_second: float) -> tuple[float, float]:
        """Return about how long passes and solve take at a speed of the forward pass, without the transfers."""
        return self.pass_flops / flops_per_second, self.solve_flops / (flops_per_second * _SOLVE_SPEED)

    def describe(self, flops_per_second: float | None = None) -> str:
        """Say in a line what will be done."""
        count = self.num_processes
        who = "one process" if count == 1 else f"{count} processes that share the samples"
        passes = "one pass" if len(self.windows) == 1 else f"{len(self.windows)} passes, each for a part of the layers"
        parts = [
            f"{who}, {passes}, {self.sample_passes} samples forward and backward a process",
            f"at most {gibibytes(self.peak_bytes)} for sums and solve on a device",
        ]
        if self.sent_bytes:
            parts.append(f"{gibibytes(self.sent_bytes)} sent by a process")
        if flops_per_second:
            collect, solve = self.seconds(flops_per_second)
            parts.append(f"about {collect:.0f} s for the statistics and {solve:.0f} s for the solve")
        return "; ".join(parts)


def make_plan(
    work: Workload,
    *,
    num_processes: int = 1,
    budget: Mapping[int, float],
    solve_alone: bool = False,
) -> Plan:
    """Spread the groups over passes and processes so that no process needs more than its budget.

    Args:
        work: What has to be done.
        num_processes: How many processes there are.
        budget: Bytes that the sums and the solve may take in a process, by number of the device.
        solve_alone: Whether the first process gets all the sums.

    Raises:
        PlanError: if a single group does not fit.
    """
    _check_fits(work, budget)
    samples = _share_samples(work, num_processes, budget, solve_alone)
    if work.solvers > 1 and len(samples.windows) > 1:  # where memory is short, another pass is dearer
        work = dataclasses.replace(work, threads=1)
        samples = _share_samples(work, num_processes, budget, solve_alone)
    return samples


def _share_samples(work: Workload, size: int, budget: Mapping[int, float], solve_alone: bool) -> Plan:
    windows = _windows(work, work.groups, budget)
    owners: dict[str, int] = {}
    for window in windows:  # all processes solve at the same time, after each window
        costs = {group.leader: group.solve_flops for group in window}
        owners |= balanced_owners(costs, 1 if solve_alone else size)
    share = -(-work.num_samples // size)
    tokens = work.num_tokens * share / max(work.num_samples, 1)
    sent = [sum(g.sent_bytes(work.itemsize) for g in work.groups if owners[g.leader] != rank) for rank in range(size)]
    return Plan(
        windows=tuple(tuple(group.leader for group in window) for window in windows),
        owners=owners,
        num_processes=size,
        sample_passes=share * len(windows),
        peak_bytes=max(max(work.peak_bytes(window).values()) for window in windows),
        sent_bytes=max(sent) if size > 1 else 0,
        pass_flops=tokens * sum(work.pass_flops(group.leader for group in window) for window in windows),
        solve_flops=_busiest(work, owners, size),
        solvers=work.solvers,
        one_thread_each=work.small,
    )


def _windows(work: Workload, groups: Sequence[Group], budget: Mapping[int, float]) -> list[list[Group]]:
    """Cut groups into as few runs as fit."""
    windows: list[list[Group]] = []
    for group in groups:
        if windows and _fits(work, [*windows[-1], group], budget):
            windows[-1].append(group)
        else:
            windows.append([group])
    return windows


def _fits(work: Workload, groups: Iterable[Group], budget: Mapping[int, float]) -> bool:
    return all(size <= budget[device] for device, size in work.peak_bytes(groups).items())


def _busiest(work: Workload, owners: Mapping[str, int], size: int) -> float:
    loads = [0.0] * size
    for group in work.groups:
        loads[owners[group.leader]] += group.solve_flops
    return max(loads)


def _check_fits(work: Workload, budget: Mapping[int, float]) -> None:
    """Verify that each group fits alone.

    Raises:
        PlanError: naming the largest that does not, and what would help.
    """
    too_large = [group for group in work.groups if not _fits(work, [group], budget)]
    if not too_large:
        return
    largest = max(too_large, key=lambda group: work.peak_bytes([group])[group.device])
    needed = work.peak_bytes([largest])[largest.device]
    narrower = " accumulate_dtype='float32' halves the sums." if work.itemsize > 4 else ""
    raise PlanError(
        f"The statistics do not fit: {', '.join(largest.members)} (input {largest.d_in}) take "
        f"{gibibytes(needed)} and there are {gibibytes(budget[largest.device])}. Layers that share an input are "
        "collected together and by one process at least, so more processes do not help. Set "
        f"memory_budget to at least {needed} bytes, free that much memory on the device, or leave these layers out of "
        f"target_modules.{narrower}"
    )


def gibibytes(size: float) -> str:
    """Return a size for people."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.2f} MiB"
