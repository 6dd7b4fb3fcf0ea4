"""A layer whose tap sees nothing keeps its start, with the reason; where no layer sees anything, that is an error."""

import pytest
import torch
from harness import make_lora_config
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.errors import NonFiniteError, StatisticsError, UnsupportedSetupError
from lora_da_hf.losses import model_loss
from lora_da_hf.pipeline.gather import UNCALLED


def run(model, samples, *, compute_loss=None, **settings):
    config = LoRADAConfig(**{"step_size": 0.1, "batch_size": 3, **settings})
    return initialize_lora_da(model, samples, config=config, compute_loss=compute_loss, progress=False)


@pytest.fixture
def fused(lora_model):
    """Return a model of which one MLP reads the weight of its gate itself, as fused kernels do."""
    model = lora_model()
    mlp = model.base_model.model.model.layers[1].mlp

    def forward(x):
        gate = functional.linear(x, mlp.gate_proj.weight)
        return mlp.down_proj(functional.silu(gate) * mlp.up_proj(x))

    mlp.forward = forward
    return model


def test_a_fused_layer_keeps_its_start_and_is_listed(fused, token_samples):
    layer = fused.base_model.model.model.layers[1].mlp.gate_proj
    before = layer.lora_A["default"].weight.detach().clone()
    report = run(fused, token_samples(6))
    assert report.kept == {"model.layers.1.mlp.gate_proj": UNCALLED}
    assert len(report.layers) == 13
    assert torch.equal(layer.lora_A["default"].weight, before)
    assert not layer.lora_B["default"].weight.any()


def test_where_no_layer_at_all_is_called_it_is_an_error(lora_model, token_samples):
    model = lora_model(target_modules=["gate_proj"], layers_to_transform=[1])
    mlp = model.base_model.model.model.layers[1].mlp
    mlp.forward = lambda x: functional.linear(functional.linear(x, mlp.gate_proj.weight), mlp.down_proj.weight)
    with pytest.raises(StatisticsError, match="any of the 1 layers"):
        run(model, token_samples(6))


# dynamo looks at .grad of what it is given, with torch 2.13, seen 2026-11
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("place", ["mlp", "model", "forward", "wrapper"])
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
    batch = {name: torch.tensor([sample[name] for sample in samples[:3]]) for name in samples[0]}
    try:
        with torch.no_grad():
            given(**batch)
        reports = [run(model, samples, step_size="line_search") for model in (plain, given)]
    finally:
        torch.compiler.reset()
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
    with pytest.raises(UnsupportedSetupError, match=r"torch.compile wrapped modules inside the model.*module.compile"):
        run(model, token_samples(6))


@pytest.mark.parametrize(
    "cut",
    [
        lambda loss: loss.detach(),
        lambda loss: loss.detach().requires_grad_(),
    ],
)
def test_a_loss_that_is_cut_off_is_an_error(lora_model, token_samples, cut):
    with pytest.raises(StatisticsError, match=r"No gradient came back .* the loss is cut off .* Check compute_loss"):
        run(lora_model(), token_samples(6), compute_loss=lambda *inputs: cut(model_loss(*inputs)))


class DeadEnd(nn.Module):
    """Wraps an MLP so that its output counts for nothing."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x).detach() * 0


def test_layers_that_the_loss_does_not_depend_on_are_kept(lora_model, token_samples):
    model = lora_model()
    layer = model.base_model.model.model.layers[1]
    layer.mlp = DeadEnd(layer.mlp)
    report = run(model, token_samples(6))
    assert report.kept == {
        f"model.layers.1.mlp.mlp.{name}": "the loss does not depend on it"
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert len(report.layers) == 11


def test_a_nan_in_the_pass_is_an_error_and_the_adapter_stays(lora_model, token_samples):
    model = lora_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def sometimes_nan(model, batch, num_items):
        loss = model_loss(model, batch, num_items)
        return loss * torch.nan if torch.is_grad_enabled() else loss

    with pytest.raises(NonFiniteError, match="The loss of a batch is nan"):
        run(model, token_samples(6), compute_loss=sometimes_nan)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
