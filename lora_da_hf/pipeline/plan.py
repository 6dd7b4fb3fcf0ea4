"""Which layers are collected and solved when: what that takes in memory, and what is free on the devices."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import convert_file_size_to_int

from lora_da_hf.adapters.targets import Target
from lora_da_hf.distributed.processes import Processes, balanced_owners
from lora_da_hf.errors import PlanError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.records import UpperTriangle
from lora_da_hf.statistics.taps import input_groups

_ITEM = 4
"""Bytes of an entry of the sums, which are in float32. They are solved in float64."""
_SMALL_WORK = 2**28
"""Bytes up to which a group is solved on one thread: its matrices are too small to be shared by several."""
_MOST_SOLVERS = 8
USABLE = 2 / 3
"""Part of the free memory that sums may take: the rest is for the activations of the pass."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are fed the same tensor, which are summed and solved together; the leader is the first.

    ``device`` is the number of the device that their sums live on, in the order of the layers.
    """

    members: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]
    device: int = 0
    device_type: str = "cpu"

    @property
    def leader(self) -> str:
        """The layer whose input is summed."""
        return self.members[0]

    @property
    def sum_bytes(self) -> int:
        """Size of the sums."""
        return _ITEM * (UpperTriangle.size(self.d_in, self.device_type) + (self.d_in + 1) * sum(self.d_outs))

    @property
    def work_bytes(self) -> int:
        """What the solve takes beside the sums: the moment twice, and a gradient four times, in float64."""
        return 2 * _ITEM * self.d_in * (2 * self.d_in + 4 * max(self.d_outs))

    @property
    def solve_cost(self) -> float:
        """Arithmetic of the solve: a Cholesky factor, and for each member the solves and the eigenvectors."""
        return self.d_in**3 / 3 + 4 * self.d_in**2 * sum(self.d_outs)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which layers are collected in which pass, and who solves them. The processes share the samples of each pass.

    Attributes:
        windows: Leaders of the groups that are collected in each pass.
        sample_passes: Forward and backward passes of one sample that the busiest process makes.
        peak_bytes: What the sums and the solve take at most, on one device of one process.
        on_host: Leaders of the groups whose matrices are summed in host memory, which then takes ``host_bytes``.
        solvers: How many groups a process solves at the same time, each on one thread if ``one_thread_each``.
    """

    windows: tuple[tuple[str, ...], ...]
    owners: dict[str, int]
    num_processes: int
    sample_passes: int
    peak_bytes: int
    solvers: int
    one_thread_each: bool
    on_host: frozenset[str] = frozenset()
    host_bytes: int = 0

    def describe(self) -> str:
        """Say in a line what will be done."""
        count, number = self.num_processes, len(self.windows)
        who = "one process" if count == 1 else f"{count} processes"
        passes = "one pass" if number == 1 else f"{number} passes"
        host = f"{gibibytes(self.host_bytes)} of host memory for sums, " if self.on_host else ""
        return (
            f"{who}, {passes}, {self.sample_passes} samples{' each' * (count > 1)}; {host}at most "
            f"{gibibytes(self.peak_bytes)} for sums and solve on a device"
        )


def plan_windows(job: Job, probe: Probe) -> Plan:
    """Make the plan, the same on all processes."""
    devices = list(dict.fromkeys(target.device for target in job.scan.targets))
    given = job.config.memory_budget
    budget = usable_by_all(devices, job.processes) if given is None else [budget_bytes(given)] * len(devices)
    return make_plan(
        groups_of(job.scan.targets, probe.shared),
        num_samples=len(probe.splits.statistics),
        budget=budget,
        host=usable_memory(torch.device("cpu")),
        num_processes=job.processes.count,
        threads=min(job.processes.gather(solver_threads(devices))),
        solve_alone=bool(job.config.save_statistics),
    )


def groups_of(targets: Sequence[Target], shared: Mapping[str, str]) -> list[Group]:
    """Group layers by the leader whose input each shares."""
    devices = list(dict.fromkeys(target.device for target in targets))
    by_name = {target.name: target for target in targets}
    return [
        Group(
            members=tuple(members),
            d_in=by_name[leader].in_features,
            d_outs=tuple(by_name[name].out_features for name in members),
            device=devices.index(by_name[leader].device),
            device_type=by_name[leader].device.type,
        )
        for leader, members in input_groups(shared).items()
    ]


def make_plan(
    groups: Sequence[Group],
    *,
    num_samples: int,
    budget: Sequence[float],
    host: float = 0.0,
    num_processes: int = 1,
    threads: int = 1,
    solve_alone: bool = False,
) -> Plan:
    """Sum what does not fit in host memory, or cut the groups into as few passes as fit, and share their solves.

    Args:
        num_samples: Of all processes.
        budget: Bytes that the sums and the solve may take in a process, on each device.
        host: Bytes that one process with layers on CUDA may take in host memory.
        threads: Those of a process's CPU, or 1 where another device solves.
        solve_alone: Whether the first process gets all the sums.

    Raises:
        PlanError: if a group does not fit alone.
    """

    def fits(some: Iterable[Group], solvers: int = 1) -> bool:
        return all(size <= budget[device] for device, size in peak_bytes(some, solvers).items())

    too_large = [group for group in groups if not fits([group])]
    if too_large:
        largest = max(too_large, key=lambda group: group.sum_bytes + group.work_bytes)
        needed = largest.sum_bytes + largest.work_bytes
        raise PlanError(
            f"The statistics do not fit: {', '.join(largest.members)} (input {largest.d_in}) take {gibibytes(needed)}, "
            f"and there are {gibibytes(budget[largest.device])}. Set memory_budget to at least {needed} bytes, free "
            "memory on the device, or leave these layers out of target_modules."
        )
    # whether a group is solved on one thread depends on sizes alone, so that the bits do, too
    small = all(group.work_bytes <= _SMALL_WORK for group in groups)
    solvers = min(threads, _MOST_SOLVERS) if small else 1
    if not fits(groups, solvers):
        solvers = 1  # another pass would be dearer than solving one after the other
    windows: list[list[Group]] = []
    for group in groups:
        if windows and fits([*windows[-1], group], solvers):
            windows[-1].append(group)
        else:
            windows.append([group])
    peak = max(max(peak_bytes(window, solvers).values()) for window in windows)
    on_host, host_bytes = frozenset[str](), 0
    if len(windows) > 1 and num_processes == 1 and all(group.device_type == "cuda" for group in groups):
        moved, taken = _moved_to_host(groups, budget)
        # beside the sums two products, in pinned memory, which comes in powers of two that are kept as it grows
        largest_sums = (max(UpperTriangle.size(g.d_in, g.device_type), g.d_in * max(g.d_outs)) for g in moved)
        needed = sum(group.sum_bytes for group in moved) + 8 * _ITEM * max(largest_sums)
        if needed <= host:
            windows, peak, host_bytes = [list(groups)], taken, needed
            on_host = frozenset(group.leader for group in moved)
    owners: dict[str, int] = {}
    for window in windows:  # all processes solve at the same time, after each window
        costs = {group.leader: group.solve_cost for group in window}
        owners |= balanced_owners(costs, 1 if solve_alone else num_processes)
    return Plan(
        windows=tuple(tuple(group.leader for group in window) for window in windows),
        owners=owners,
        num_processes=num_processes,
        sample_passes=-(-num_samples // num_processes) * len(windows),
        peak_bytes=peak,
        solvers=solvers,
        one_thread_each=small,
        on_host=on_host,
        host_bytes=host_bytes,
    )


def _moved_to_host(groups: Sequence[Group], budget: Sequence[float]) -> tuple[list[Group], int]:
    """Return the groups that are summed in host memory, and what the sums and the solve then take at most on a device.

    They are solved on their device one by one. Their products in the pass take less there than that.
    """
    of_device = [[group for group in groups if group.device == device] for device in range(len(budget))]
    taken = [max(group.sum_bytes + group.work_bytes for group in found) for found in of_device]
    for device, found in enumerate(of_device):
        taken[device] += _ITEM * sum(group.d_in + sum(group.d_outs) for group in found)  # vectors stay
    moved: list[Group] = []
    for group in groups:
        if taken[group.device] + group.sum_bytes <= budget[group.device]:
            taken[group.device] += group.sum_bytes
        else:
            moved.append(group)
    return moved, max(taken)


def peak_bytes(groups: Iterable[Group], solvers: int = 1) -> dict[int, int]:
    """Return what it takes at most, by device, to collect groups at once and to solve as many of them at a time."""
    by_device: dict[int, list[Group]] = {}
    for group in groups:
        by_device.setdefault(group.device, []).append(group)
    return {
        device: sum(group.sum_bytes for group in found) + sum(sorted(group.work_bytes for group in found)[-solvers:])
        for device, found in by_device.items()
    }


def gibibytes(size: float) -> str:
    """Return a size for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def solver_threads(devices: Sequence[torch.device]) -> int:
    """Return on how many threads of this process layers that live on these devices are solved."""
    return torch.get_num_threads() if all(device.type == "cpu" for device in devices) else 1


def budget_bytes(budget: float | str) -> int:
    """Return `memory_budget` in bytes."""
    if isinstance(budget, str) and not budget.isdigit():
        return convert_file_size_to_int(budget.replace(" ", ""))
    return int(budget)


def usable_by_all(devices: Sequence[torch.device], processes: Processes) -> list[float]:
    """Return the bytes that sums may take on each device in every process; those of a machine share its memory."""
    sharers = processes.gather(platform.node()).count(platform.node())
    mine = [usable_memory(device) / (sharers if device.type == "cpu" else 1) for device in devices]
    return [min(of_device) for of_device in zip(*processes.gather(mine), strict=True)]


def usable_memory(device: torch.device) -> float:
    """Return the bytes that sums may take on a device if no budget is given: infinity if it does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) * USABLE
    if device.type == "cpu":
        return min(psutil.virtual_memory().available, _free_in_container(Path("/sys/fs/cgroup"))) * USABLE
    return math.inf


def _free_in_container(group: Path) -> float:
    """Return what the limit of a control group (version 2) leaves; file pages that can be dropped are free."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        details = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) - used + int(details.get("inactive_file", 0))
