"""Models that torch.compile or DDP wrapped: run as they are written, or refused."""

import pytest
import torch
import torch.distributed as dist
from harness import initialize, make_lora_config
from peft import get_peft_model

from lora_da_hf.errors import UnsupportedSetupError


# dynamo looks at .grad of what it is given, with torch 2.13, seen 2026-11
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("place", ["mlp", "model", "forward", "wrapper", "ddp"])
def test_a_model_compiled_before_is_run_as_it_is_written(lora_model, token_samples, place):
    """A graph that was traced while a step was zero would keep it so, and the search would find no step."""
    samples = token_samples(24, min_length=8, max_length=8)
    plain, compiled = (lora_model(target_modules=["gate_proj", "down_proj"]) for _ in range(2))
    given = compiled
    if place == "mlp":
        for layer in compiled.base_model.model.model.layers:
            layer.mlp.compile(backend="eager")
    elif place == "model":
        compiled.compile(backend="eager")
    elif place == "forward":
        inner = compiled.get_base_model()
        inner.forward = torch.compile(inner.forward, backend="eager")
    else:
        given = torch.compile(compiled, backend="eager")
    if place == "ddp":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        given = torch.nn.parallel.DistributedDataParallel(given)
    batch = {name: torch.tensor([sample[name] for sample in samples[:3]]) for name in samples[0]}
    try:
        with torch.no_grad():
            given(**batch)
        reports = [initialize(model, samples) for model in (plain, given)]
    finally:
        torch.compiler.reset()
        if place == "ddp":
            dist.destroy_process_group()
    assert reports[0].step_size > 0
    assert [layer.name for layer in reports[1].layers] == [layer.name for layer in reports[0].layers]
    expected = dict(plain.named_parameters())
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


@pytest.mark.parametrize("place", ["layer", "base"])
def test_compiled_modules_with_other_names_are_refused(tiny_llama, token_samples, place):
    base = tiny_llama()
    if place == "base":
        base = torch.compile(base, backend="eager")
    model = get_peft_model(base, make_lora_config())
    if place == "layer":
        layers = model.base_model.model.model.layers
        layers[0] = torch.compile(layers[0], backend="eager")
    with pytest.raises(UnsupportedSetupError, match="wrapped modules inside the model"):
        initialize(model, token_samples(6))
