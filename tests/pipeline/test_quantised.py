"""Bases in few bits: statistics through their layers are those of the weights that these stand for."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from harness import (
    EIGHT,
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    base_linear_layers,
    factors,
    initialize,
    stored_statistics,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from lora_da_hf import load_init, refit_init
from lora_da_hf.errors import TargetError

SIZE = {"hidden_size": 64, "intermediate_size": 128}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PackedLinear(nn.Module):
    """A stand-in for a layer of GPTQ's or AWQ's kind: no linear one of torch's, and its weight is no parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def dequantize(self):
        return self.qweight * self.scale

    def forward(self, x):
        return x @ self.dequantize().T


def pack(model, kind):
    for name, layer in base_linear_layers(model).items():
        model.get_base_model().get_submodule(name).base_layer = kind(layer)


class InferenceLinear(PackedLinear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class TupleLinear(PackedLinear):
    def forward(self, x):
        return super().forward(x), None


def load(base, folder, **settings):
    base.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, dtype=torch.float32, attn_implementation="eager", **settings
    )


def by_bitsandbytes(**settings):
    def quantise(base, folder):
        config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
        return load(base, folder, quantization_config=config)

    return quantise


def by_torchao(base, folder):
    quantization = pytest.importorskip("torchao.quantization")
    return load(base, folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def by_hqq(base, folder):
    """Put HQQ's layers in 4 bits in a base: transformers loads them on a GPU alone."""
    hqq = pytest.importorskip("hqq.core.quantize")
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    for name, layer in list(base.model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            quantised = hqq.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
            setattr(base.model.get_submodule(parent), last, quantised)
    return base


def dequantised(layer):
    """Return the weight that a layer stands for."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    if hasattr(layer.weight, "qdata"):
        return layer.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if getattr(layer.weight, "quant_state", None) is not None:
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def bits_of(model):
    """Copy what the base layers store."""
    names = ("qweight", "W_q", "weight")
    stored = {
        name: next(getattr(layer, attribute) for attribute in names if hasattr(layer, attribute))
        for name, layer in base_linear_layers(model).items()
    }
    return {name: getattr(tensor, "qdata", tensor.data).clone() for name, tensor in stored.items()}


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra"
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("quantise", "tolerance"),
    [
        pytest.param(by_bitsandbytes(load_in_4bit=True), 1e-4, id="fp4", marks=needs_bitsandbytes),
        pytest.param(by_bitsandbytes(**NF4), 1e-4, id="nf4", marks=needs_bitsandbytes),
        pytest.param(by_bitsandbytes(load_in_8bit=True), 0.1, id="int8", marks=needs_bitsandbytes),  # inputs too
        pytest.param(None, 1e-5, id="packed by hand"),
        pytest.param(by_torchao, 1e-4, id="torchao", marks=pytest.mark.slow),
        pytest.param(by_hqq, 1e-4, id="hqq", marks=pytest.mark.slow),
    ],
)
def test_statistics_are_those_of_the_weights_that_the_layers_stand_for(
    tmp_path, tiny_llama, lora_model, samples, quantise, tolerance
):
    base = quantise(tiny_llama(**SIZE), tmp_path / "base") if quantise else tiny_llama(**SIZE)
    model = lora_model(model=base, target_modules=TARGETS)
    if not quantise:
        pack(model, PackedLinear)
    plain, stored = tiny_llama(**SIZE), bits_of(model)
    with torch.no_grad():
        for name, layer in base_linear_layers(model).items():
            weight = dequantised(layer)
            assert not torch.equal(weight, plain.get_submodule(name).weight)
            plain.get_submodule(name).weight.copy_(weight)
    report = initialize(model, samples, tmp_path / "quantised", **EIGHT)
    initialize(lora_model(model=plain, target_modules=TARGETS), samples, tmp_path / "plain", **EIGHT)
    assert len(report.layers) == LINEAR_LAYERS
    assert report.search_loss_after < report.search_loss_before
    found, expected = (stored_statistics(tmp_path / which) for which in ("quantised", "plain"))
    assert_statistics_equal(found, expected, tolerance)
    assert_same_tensors(bits_of(model), stored)
    assert all(tensor.any() for tensor in factors(adapter_weights(model), "B").values())


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("start", ["gradient", "whitened_gradient", "inputs"])
def test_every_start_of_a_4_bit_base_is_that_of_its_statistics(tmp_path, tiny_llama, lora_model, samples, start):
    for name in ("lora_da", start):
        base = by_bitsandbytes(**NF4)(tiny_llama(**SIZE), tmp_path / "base")
        initialize(lora_model(model=base, target_modules=TARGETS), samples, tmp_path / name, start=name, **EIGHT)
    refitted = refit_init(tmp_path / "lora_da", tmp_path / "new", config={"start": start}, step_size=0.1)
    for name, basis in load_init(tmp_path / start).bases.items():
        torch.testing.assert_close(refitted.bases[name].basis_A, basis.basis_A, atol=1e-4, rtol=0)
        torch.testing.assert_close(refitted.bases[name].basis_B, basis.basis_B, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [InferenceLinear, TupleLinear])
def test_a_layer_without_a_plain_output_or_a_backward_is_an_error(tiny_llama, lora_model, samples, kind):
    model = lora_model()
    pack(model, kind)
    before = adapter_weights(model)
    with pytest.raises(TargetError, match=rf"q_proj.*{kind.__name__}"):
        initialize(model, samples)
    assert_same_tensors(adapter_weights(model), before)


def test_a_4_bit_weight_that_is_packed_for_inference_is_an_error(lora_model, samples):
    model = lora_model()
    layer = next(iter(base_linear_layers(model).values()))
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # as bitsandbytes marks it
    with pytest.raises(TargetError, match=r"q_proj.*packed"):
        initialize(model, samples)
