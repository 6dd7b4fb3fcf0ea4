"""What only a GPU can show: the same adapter as on the CPU, whatever the precision of its products."""

import copy

import pytest
import torch
from harness import assert_updates_equal, initialize, written_updates

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
