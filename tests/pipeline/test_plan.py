"""Who collects which layers when: within the memory, and with as few passes as that allows."""

import json
import platform
from types import SimpleNamespace

import pytest
import torch
from harness import measured_tensors
from transformers import LlamaConfig

from lora_da_hf.cli.main import main
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.processes import Processes
from lora_da_hf.errors import PlanError
from lora_da_hf.pipeline.memory import free_memory, linear_weights, usable_by_all
from lora_da_hf.pipeline.plan import Group, Workload, make_plan
from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.solve import factorize, solve_layer

UNLIMITED = {0: float("inf")}


def attention(number):
    """Make the layers of an attention block: q, k and v share an input, and the output projection has its own."""
    return (
        Group(members=(f"{number}.q", f"{number}.k", f"{number}.v"), d_in=64, d_outs=(64, 32, 32)),
        Group(members=(f"{number}.o",), d_in=64, d_outs=(64,)),
    )


def make_work(blocks=8, *, samples=64, groups=None, **overrides):
    groups = groups or tuple(group for number in range(blocks) for group in attention(number))
    settings = {"weights": sum(g.weights for g in groups), "num_samples": samples, "num_tokens": 10 * samples}
    return Workload(groups=groups, **{**settings, **overrides})


def leaders(work):
    return tuple(group.leader for group in work.groups)


def budget_for(work, count):
    """Return a budget that the first ``count`` groups just fit in."""
    return work.peak_bytes(work.groups[:count])


def test_layers_that_fit_are_collected_in_one_pass():
    work = make_work()
    plan = make_plan(work, budget=work.peak_bytes(work.groups))
    assert plan.windows == (leaders(work),)
    assert (plan.sample_passes, plan.sent_bytes) == (64, 0)
    assert plan.peak_bytes == work.peak_bytes(work.groups)[0]


def test_a_byte_less_takes_another_pass():
    work = make_work()
    plan = make_plan(work, budget={0: work.peak_bytes(work.groups)[0] - 1})
    assert [len(window) for window in plan.windows] == [15, 1]
    assert plan.sample_passes == 128


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_every_group_is_collected_once_by_processes_within_their_budget(size, count):
    work = make_work()
    budget = budget_for(work, count)
    plan = make_plan(work, num_processes=size, budget=budget)
    assert sorted(leader for window in plan.windows for leader in window) == sorted(leaders(work))
    assert set(plan.owners) == set(leaders(work))
    assert set(plan.owners.values()) <= set(range(size))
    groups = {group.leader: group for group in work.groups}
    for window in plan.windows:
        assert all(taken <= budget[0] for taken in work.peak_bytes(groups[leader] for leader in window).values())
    assert plan.peak_bytes <= budget[0]


def test_each_device_has_a_budget_of_its_own():
    groups = tuple(Group(members=(f"{n}",), d_in=32, d_outs=(32,), device=n % 2) for n in range(6))
    work = make_work(groups=groups)
    each = work.peak_bytes(groups[:1])[0]
    assert len(make_plan(work, budget={0: 10 * each, 1: 10 * each}).windows) == 1
    plan = make_plan(work, budget={0: 10 * each, 1: each})
    assert [len(window) for window in plan.windows] == [3, 2, 1]


def test_processes_share_the_samples_where_memory_suffices():
    plan = make_plan(make_work(samples=7), num_processes=2, budget=UNLIMITED)
    assert (plan.sample_passes, len(plan.windows)) == (4, 1)


def test_statistics_that_are_stored_are_solved_by_the_first_process():
    work = make_work()
    plan = make_plan(work, num_processes=4, budget=budget_for(work, 4), solve_alone=True)
    assert set(plan.owners.values()) == {0}


def test_the_owners_of_each_window_share_its_solve():
    work = make_work()
    plan = make_plan(work, num_processes=2, budget=budget_for(work, 4))
    assert all({plan.owners[leader] for leader in window} == {0, 1} for window in plan.windows)
    alone = make_plan(work, budget=budget_for(work, 4)).solve_flops
    assert plan.solve_flops == pytest.approx(alone / 2, rel=0.2)


def test_a_moment_is_sent_as_a_triangle():
    group = Group(members=("a",), d_in=100, d_outs=(10,))
    assert group.sent_bytes(4) == 4 * (100 * 101 // 2 + 1000 + 10)
    work = make_work(groups=(group,))
    assert make_plan(work, num_processes=2, budget=UNLIMITED).sent_bytes == group.sent_bytes(4)


def test_a_later_window_goes_back_a_shorter_way_unless_it_recomputes():
    work = make_work()
    first, last = work.groups[0].leader, work.groups[-1].leader
    assert work.pass_flops([last]) < work.pass_flops([first])
    recomputing = make_work(checkpointing=True)
    own = {leader: recomputing.groups[k].pass_flops for leader, k in ((first, 0), (last, -1))}
    assert recomputing.pass_flops([last]) - own[last] == recomputing.pass_flops([first]) - own[first]


def test_a_pass_over_everything_costs_what_arithmetic_says():
    work = make_work()
    own = sum(2 * group.weights + group.d_in**2 for group in work.groups)
    assert work.pass_flops(leaders(work)) == 4 * work.weights + own


def test_layers_that_do_not_fit_alone_are_an_error_that_says_what_would_help():
    work = make_work(itemsize=8)
    needed = work.peak_bytes(work.groups[:1])[0]
    with pytest.raises(PlanError) as error:
        make_plan(work, num_processes=2, budget={0: needed - 1})
    message = str(error.value)
    assert message.startswith(
        "The statistics do not fit: 0.q, 0.k, 0.v (input 64) take 0.31 MiB and there are 0.31 MiB."
    )
    assert f"Set memory_budget to at least {needed} bytes" in message
    assert "more processes do not help" in message
    assert message.endswith("accumulate_dtype='float32' halves the sums.")
    assert "float32" not in str(_error_of(make_work()))


def _error_of(work):
    with pytest.raises(PlanError) as error:
        make_plan(work, budget={0: 1})
    return error.value


def test_small_groups_are_solved_one_on_each_thread_if_there_is_memory():
    work = make_work(threads=4)
    alone = make_work()
    plenty = make_plan(work, budget=UNLIMITED)
    assert plenty.solvers == 4
    assert plenty.peak_bytes - make_plan(alone, budget=UNLIMITED).peak_bytes == 3 * work.groups[0].work_bytes
    assert make_plan(work, budget={0: plenty.peak_bytes - 1}) == make_plan(alone, budget={0: plenty.peak_bytes - 1})
    large = Group(members=("wide",), d_in=4096, d_outs=(4096,))
    assert make_plan(make_work(threads=4, groups=(*work.groups, large)), budget=UNLIMITED).solvers == 1
    assert make_plan(make_work(threads=64), budget=UNLIMITED).solvers == 8


def test_a_plan_says_what_will_be_done():
    work = make_work()
    plan = make_plan(work, num_processes=4, budget=budget_for(work, 4))
    text = plan.describe(1e6)
    assert text.startswith("4 processes that share the samples, 4 passes, each for a part of the layers, 64 samples")
    assert "sent by a process" in text
    assert "s for the solve" in text
    alone = make_plan(work, budget=UNLIMITED)
    assert alone.describe().startswith("one process, one pass, 64 samples forward and backward a process; at most")
    assert "sent" not in alone.describe()


def test_linear_weights_are_counted_without_the_adapter(tiny_llama, lora_model):
    plain = tiny_llama()
    expected = sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
    assert linear_weights(plain) == expected == linear_weights(lora_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d_in", "d_out"), [(512, 512), (400, 1200), (1200, 400)])
def test_a_solve_takes_the_memory_that_is_planned_for_it(monkeypatch, d_in, d_out, dtype):
    monkeypatch.setattr("lora_da_hf.pipeline.plan.solve_dtype", lambda width: dtype)
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
        factorized = factorize(statistics, config, layer="a", dtype=dtype)
        solve_layer(statistics, factorized, config, layer="a", rank=8, population_size=100)
    planned = Group(members=("a",), d_in=d_in, d_outs=(d_out,)).work_bytes
    assert 0.25 * planned < peak[0] <= planned


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


@pytest.mark.parametrize(("uuid_of_other", "sharers"), [("GPU-a", 2), ("GPU-b", 1)])
def test_a_gpu_is_shared_by_the_processes_that_see_the_same_one_whatever_they_call_it(
    monkeypatch, uuid_of_other, sharers
):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))
    monkeypatch.setattr("lora_da_hf.pipeline.memory.free_memory", lambda device: 24.0)
    ranks = TwoProcesses([f"{platform.node()} {uuid_of_other}"], [16.0])
    assert usable_by_all([torch.device("cuda", 0)], ranks) == [16.0 / sharers]


def test_processes_of_a_machine_share_its_memory_and_all_get_the_least_that_one_has(monkeypatch):
    monkeypatch.setattr("lora_da_hf.pipeline.memory.free_memory", lambda device: 24.0)
    cpu = [torch.device("cpu")]
    assert usable_by_all(cpu, TwoProcesses([f"{platform.node()} cpu"], [16.0])) == [8.0]
    assert usable_by_all(cpu, TwoProcesses(["another machine cpu"], [8.0])) == [8.0]
    assert usable_by_all(cpu, TwoProcesses(["another machine cpu"], [32.0])) == [16.0]


def test_the_free_memory_of_this_machine_is_known():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
