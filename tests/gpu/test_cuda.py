"""What only a GPU can show: the same statistics there as on the CPU, and precision flags that do not matter."""

import copy

import pytest
import torch

from lora_da_hf import LoRADAConfig, initialize_lora_da

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def products(model):
    return {
        name: (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach().cpu().double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("tf32", [False, True])
def test_adapter_on_cuda_equals_the_one_on_cpu(lora_model, token_samples, tf32):
    on_cpu = lora_model()
    on_cuda = copy.deepcopy(on_cpu).cuda()
    samples = token_samples(12)
    config = LoRADAConfig(num_samples=12, step_size=0.1, search_samples=0)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        initialize_lora_da(on_cuda, samples, config=config, progress=False)
    finally:
        torch.set_float32_matmul_precision(precision)
    initialize_lora_da(on_cpu, samples, config=config, progress=False)
    expected, found = products(on_cpu), products(on_cuda)
    tolerance = 2e-2 if tf32 else 1e-3
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name
