"""What only a GPU can show: the same adapter as on the CPU, in whatever precision, and sums in host memory."""

import copy

import pytest
import torch
from harness import assert_statistics_equal, assert_updates_equal, initialize, stored_statistics, written_updates

from lora_da_hf.statistics.moments import HostSums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tf32", [False, True])
def test_adapter_on_cuda_equals_the_one_on_cpu(lora_model, samples, tf32):
    on_cpu = lora_model()
    on_cuda = copy.deepcopy(on_cpu).cuda()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        initialize(on_cuda, samples, step_size=0.1)
    finally:
        torch.set_float32_matmul_precision(precision)
    initialize(on_cpu, samples, step_size=0.1)
    found = {name: update.cpu() for name, update in written_updates(on_cuda).items()}
    expected = {name: update.numpy() for name, update in written_updates(on_cpu).items()}
    assert_updates_equal(found, expected, 2e-2 if tf32 else 1e-3)


BUDGETS = [(300_000, torch.float32), (450_000, torch.float32), (300_000, torch.bfloat16)]


@pytest.mark.parametrize(("budget", "dtype"), BUDGETS)
def test_sums_in_host_memory_equal_those_of_the_device_in_one_pass(tmp_path, lora_model, samples, budget, dtype):
    found = []
    for folder, memory in (("device", None), ("host", budget)):
        model = lora_model().to("cuda", dtype)
        where = tmp_path / folder
        report = initialize(model, samples, where, step_size=0.1, save_statistics=True, memory_budget=memory)
        assert "one pass" in report.plan
        assert ("host memory" in report.plan) == (memory is not None)
        found.append((stored_statistics(where), {n: u.cpu() for n, u in written_updates(model).items()}))
    assert_statistics_equal(found[1][0], found[0][0], 1e-6)
    assert_updates_equal(found[1][1], found[0][1], 1e-3)


@pytest.mark.parametrize("more", [0, 2])
def test_an_error_in_an_addition_is_raised_at_the_end_and_before(more):
    sums, overlaps = HostSums(), torch.zeros(1).expand(3)  # which no sum can be written into

    def add(times):
        for _ in range(times):
            with sums.on(torch.device("cuda", 0), overlaps) as part:
                part += 1

    add(1)
    with pytest.raises(RuntimeError, match="memory"):
        add(more) if more else sums.finish()
