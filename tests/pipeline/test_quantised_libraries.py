"""Bases that torchao and HQQ quantise, for real and on the CPU. For GPTQ and AWQ `test_initialize.py` has stand-ins."""

import pytest
import torch
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    base_linear_layers,
    collate,
    factors,
    make_config,
)
from launching import stored_statistics
from transformers import AutoModelForCausalLM, TorchAoConfig

from lora_da_hf import initialize_lora_da

SIZE = {"hidden_size": 64, "intermediate_size": 128}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def by_torchao(tiny_llama, folder):
    """Load a base in 8 bits as users do."""
    quantization = pytest.importorskip("torchao.quantization")
    tiny_llama(**SIZE).save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base",
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        device_map={"": "cpu"},
        dtype=torch.float32,
        attn_implementation="eager",
    )


def by_hqq(tiny_llama, folder):
    """Put HQQ's layers in 4 bits in a base: transformers loads them on a GPU alone."""
    hqq = pytest.importorskip("hqq.core.quantize")
    base = tiny_llama(**SIZE)
    for name, layer in list(base.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            settings = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
            quantised = hqq.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
            setattr(base.model.get_submodule(parent), last, quantised)
    return base


def dequantised(layer):
    """Return the weight that a layer stands for, and what it stores."""
    if hasattr(layer, "W_q"):
        return layer.dequantize(), layer.W_q.data
    return layer.weight.dequantize(), layer.weight.qdata


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("quantise", [by_torchao, by_hqq])
def test_statistics_through_a_librarys_layers_are_those_of_the_weights_they_stand_for(
    tmp_path, tiny_llama, lora_model, token_samples, quantise
):
    model = lora_model(model=quantise(tiny_llama, tmp_path), target_modules=TARGETS)
    plain = tiny_llama(**SIZE)
    stored = {}
    with torch.no_grad():
        for name, layer in base_linear_layers(model).items():
            weight, stored[name] = dequantised(layer)
            assert not torch.equal(weight, plain.get_submodule(name).weight)
            plain.get_submodule(name).weight.copy_(weight)
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    assert len(stored) == LINEAR_LAYERS
    settings = {
        "config": make_config(num_samples=8, sample_selection="head", save_statistics=True),
        "data_collator": collate,
        "progress": False,
    }
    samples = token_samples(12)
    report = initialize_lora_da(model, samples, output_dir=tmp_path / "quantised", **settings)
    initialize_lora_da(
        lora_model(model=plain, target_modules=TARGETS), samples, output_dir=tmp_path / "plain", **settings
    )
    assert len(report.layers) == LINEAR_LAYERS
    assert report.search_loss_after < report.search_loss_before
    found, expected = (stored_statistics(tmp_path / which) for which in ("quantised", "plain"))
    assert_statistics_equal(found, expected, 1e-4)
    assert_same_tensors({name: dequantised(layer)[1] for name, layer in base_linear_layers(model).items()}, stored)
    assert all(tensor.any() for tensor in factors(adapter_weights(model), "B").values())
