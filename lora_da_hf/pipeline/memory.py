"""The plan of a job: what its layers take, and what is free on their devices."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int

from lora_da_hf.adapters.targets import Target
from lora_da_hf.distributed.processes import Processes
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Group, Plan, Workload, make_plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.statistics.taps import input_groups

_USABLE = 2 / 3
"""Part of the free memory that sums may take: the rest is for the activations of the pass."""


def plan_windows(job: Job, probe: Probe) -> Plan:
    """Make the plan, the same on all processes."""
    devices = list(dict.fromkeys(target.device for target in job.scan.targets))
    work = Workload(
        groups=groups_of(job.scan.targets, probe.shared),
        num_samples=len(probe.splits.statistics),
        threads=min(job.processes.gather(solver_threads(devices))),
    )
    if job.config.memory_budget is None:
        budget = usable_by_all(devices, job.processes)
    else:
        budget = [budget_bytes(job.config.memory_budget)] * len(devices)
    return make_plan(
        work,
        num_processes=job.processes.count,
        budget=dict(enumerate(budget)),
        solve_alone=job.config.save_statistics,
    )


def groups_of(targets: Sequence[Target], shared: Mapping[str, str]) -> tuple[Group, ...]:
    """Group layers by the leader whose input each shares."""
    devices = list(dict.fromkeys(target.device for target in targets))
    by_name = {target.name: target for target in targets}
    return tuple(
        Group(
            members=tuple(members),
            d_in=by_name[leader].in_features,
            d_outs=tuple(by_name[name].out_features for name in members),
            device=devices.index(by_name[leader].device),
        )
        for leader, members in input_groups(shared).items()
    )


def solver_threads(devices: list[torch.device]) -> int:
    """Return on how many threads of this process layers that live on these devices are solved."""
    return torch.get_num_threads() if all(device.type == "cpu" for device in devices) else 1


def budget_bytes(budget: float | str) -> int:
    """Return `memory_budget` in bytes."""
    if isinstance(budget, str) and not budget.isdigit():
        return convert_file_size_to_int(budget.replace(" ", ""))
    return int(budget)


def usable_by_all(devices: Sequence[torch.device], processes: Processes) -> list[float]:
    """Return the bytes that sums may take on each device in every process: those that share one get equal parts."""
    places = [_place(device) for device in devices]
    sharers = Counter(place for of_process in processes.gather(places) for place in of_process)
    mine = [usable_memory(device) / sharers[place] for device, place in zip(devices, places, strict=True)]
    return [min(of_device) for of_device in zip(*processes.gather(mine), strict=True)]


def _place(device: torch.device) -> str:
    """Name a device uniquely: each process may see other GPUs, and call its first cuda:0."""
    of_machine = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device
    return f"{platform.node()} {of_machine}"


def usable_memory(device: torch.device) -> float:
    """Return the bytes that sums may take on a device if no budget is given: infinity if it does not tell."""
    return free_memory(device) * _USABLE


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device: infinity if it does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        return min(_free_on_machine(), _free_in_container(Path("/sys/fs/cgroup")))
    return math.inf


def _free_on_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return math.inf
    sizes = dict(line.split(":") for line in lines)
    return float(sizes["MemAvailable"].split()[0]) * 1024


def _free_in_container(group: Path) -> float:
    """Return what the limit of a control group (version 2) leaves; file pages that can be dropped are free."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        details = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) - used + int(details.get("inactive_file", 0))
