"""Which layers are collected and solved when: within the memory, and with as few passes as that allows."""

import dataclasses
import json
import platform

import pytest
import torch
from harness import measured_tensors
from transformers import LlamaConfig

from lora_da_hf.cli.main import main
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.processes import Processes
from lora_da_hf.errors import PlanError
from lora_da_hf.pipeline.plan import Group, budget_bytes, make_plan, peak_bytes, usable_by_all, usable_memory
from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.solve import factorize, solve_layer

UNLIMITED = [float("inf")]


def attention(number):
    """Make the layers of an attention block: q, k and v share an input, and the output projection has its own."""
    return (
        Group(members=(f"{number}.q", f"{number}.k", f"{number}.v"), d_in=64, d_outs=(64, 32, 32)),
        Group(members=(f"{number}.o",), d_in=64, d_outs=(64,)),
    )


GROUPS = [group for number in range(8) for group in attention(number)]


def plan(*, budget, groups=GROUPS, **options):
    return make_plan(groups, num_samples=64, budget=budget, **options)


def needs(count, groups=GROUPS):
    """Return what the first ``count`` groups just fit in."""
    return peak_bytes(groups[:count])[0]


def test_what_fits_is_collected_in_one_pass_and_a_byte_less_takes_another():
    peak = needs(16)
    found = plan(budget=[peak])
    assert found.windows == (tuple(group.leader for group in GROUPS),)
    assert (found.sample_passes, found.peak_bytes) == (64, peak)
    found = plan(budget=[peak - 1])
    assert [len(window) for window in found.windows] == [15, 1]
    assert found.sample_passes == 128


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_every_group_is_collected_once_within_the_budget_and_the_processes_share_samples_and_solves(size, count):
    found = plan(num_processes=size, budget=[needs(count)])
    groups = {group.leader: group for group in GROUPS}
    assert sorted(leader for window in found.windows for leader in window) == sorted(groups)
    assert set(found.owners) == set(groups)
    peaks = [peak_bytes([groups[leader] for leader in window])[0] for window in found.windows]
    assert max(peaks) == found.peak_bytes <= needs(count)
    assert found.sample_passes == -(-64 // size) * len(found.windows)
    for window in found.windows:  # all processes solve after each window
        assert len({found.owners[leader] for leader in window}) == min(size, len(window))


def test_each_device_has_a_budget_of_its_own():
    groups = [Group(members=(f"{n}",), d_in=32, d_outs=(32,), device=n % 2) for n in range(6)]
    each = needs(1, groups)
    assert len(plan(groups=groups, budget=[10 * each, 10 * each]).windows) == 1
    assert [len(window) for window in plan(groups=groups, budget=[10 * each, each]).windows] == [3, 2, 1]


def test_one_process_on_cuda_sums_in_host_memory_what_does_not_fit_if_that_has_room():
    groups = [dataclasses.replace(group, device_type="cuda") for group in GROUPS]
    few = [needs(4, groups)]
    found = plan(groups=groups, budget=few, host=2**24)
    assert found.windows == (tuple(group.leader for group in groups),)
    assert 0 < len(found.on_host) < len(groups)
    assert found.peak_bytes <= few[0]
    assert sum(group.sum_bytes for group in groups if group.leader in found.on_host) < found.host_bytes <= 2**24
    assert f"{found.host_bytes / 2**20:.2f} MiB of host memory" in found.describe()
    windows = plan(groups=groups, budget=few)
    assert len(windows.windows) > 1
    assert plan(groups=groups, budget=few, host=found.host_bytes - 1) == windows
    assert not plan(groups=groups, budget=UNLIMITED, host=2**24).on_host
    assert len(plan(groups=groups, budget=few, host=2**24, num_processes=2).windows) > 1
    assert len(plan(budget=few, host=2**24).windows) > 1


def test_statistics_that_are_stored_are_solved_by_the_first_process():
    assert set(plan(num_processes=4, budget=UNLIMITED, solve_alone=True).owners.values()) == {0}


def test_a_group_that_does_not_fit_alone_is_an_error_that_says_what_would_help():
    needed = needs(1)
    with pytest.raises(PlanError, match=rf"0\.q, 0\.k, 0\.v \(input 64\) .* memory_budget to at least {needed} bytes"):
        plan(num_processes=2, budget=[needed - 1])


def test_small_groups_are_solved_one_on_each_thread_if_there_is_memory():
    plenty = plan(budget=UNLIMITED, threads=4)
    assert plenty.solvers == 4
    assert plenty.peak_bytes - plan(budget=UNLIMITED).peak_bytes == 3 * GROUPS[0].work_bytes
    less = [plenty.peak_bytes - 1]
    assert plan(budget=less, threads=4) == plan(budget=less)
    large = Group(members=("wide",), d_in=4096, d_outs=(4096,))
    assert plan(groups=[*GROUPS, large], budget=UNLIMITED, threads=4).solvers == 1
    assert plan(budget=UNLIMITED, threads=64).solvers == 8


@pytest.mark.parametrize(("d_in", "d_out"), [(512, 512), (400, 1200), (1200, 400)])
def test_a_solve_takes_the_memory_that_is_planned_for_it(d_in, d_out):
    rows = torch.randn(2 * d_in, d_in)
    statistics = LayerStatistics(
        input_second_moment=rows.mT @ rows / len(rows),
        output_grad_second_moment_diag=torch.rand(d_out),
        weight_grad=torch.randn(d_out, d_in),
        num_input_tokens=1,
        num_output_tokens=1,
    )
    config = LoRADAConfig()
    with measured_tensors() as peak:
        factorized = factorize(statistics, config, layer="a")
        solve_layer(statistics, factorized, config, layer="a", rank=8, population_size=100)
    planned = Group(members=("a",), d_in=d_in, d_outs=(d_out,)).work_bytes
    assert 0.25 * planned < peak[0] <= planned


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_sums_of_a_7b_take_35_gib_since_half_of_each_moment_is_kept(device_type):
    shapes = [(4096, (4096,) * 3), (4096, (4096,)), (4096, (11008,) * 2), (11008, (4096,))]
    groups = [Group(members=("a",), d_in=d_in, d_outs=d_outs, device_type=device_type) for d_in, d_outs in shapes]
    assert 34 * 2**30 < 32 * sum(group.sum_bytes for group in groups) < 35 * 2**30


def test_a_70b_in_four_bits_fits_on_80_gib(tmp_path, capfd):
    """Besides 35 GiB of weights and some for the pass, two thirds of the rest: a device of each of eight processes."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    LlamaConfig(num_hidden_layers=2, vocab_size=1000, **shape).save_pretrained(tmp_path)
    words = ["--target_modules", "all-linear", "--world_size", "8", "--da_memory_budget", "28GiB", "--json"]
    assert main(["plan", str(tmp_path), *words]) == 0
    assert json.loads(capfd.readouterr().out)["peak_bytes"] < 28 * 2**30


class TwoProcesses(Processes):
    """The first of two processes, the other of which says what it is told to."""

    def __init__(self, *answers):
        super().__init__(0, 2)
        self.answers = list(answers)

    def gather(self, value):
        return [value, self.answers.pop(0)]


@pytest.mark.parametrize(("other", "free", "expected"), [(platform.node(), 7.0, 7.0), ("another", 32.0, 16.0)])
def test_processes_of_a_machine_share_its_memory_and_all_get_the_least_that_one_has(monkeypatch, other, free, expected):
    monkeypatch.setattr("lora_da_hf.pipeline.plan.usable_memory", lambda device: 16.0)
    assert usable_by_all([torch.device("cpu")], TwoProcesses(other, [free])) == [expected]
    assert usable_by_all([torch.device("cuda")], TwoProcesses(other, [free])) == [min(16.0, free)]


def test_memory_is_known_and_read():
    assert 2**20 < usable_memory(torch.device("cpu")) < 2**50
    assert [budget_bytes(b) for b in (1024.0, "1024", "8GiB", "1.5 KiB", "8GB")] == [1024, 1024, 2**33, 1536, 8 * 10**9]
