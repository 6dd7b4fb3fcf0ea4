"""The pass leaves nothing behind, whether it succeeds or not."""

import random

import numpy as np
import pytest
import torch
from families.zoo import FAMILIES
from harness import adapter_weights, assert_same_tensors, make_config, make_learnable_samples, turn_checkpointing_on
from transformers import MixtralConfig, MixtralForCausalLM

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.losses import model_loss
from lora_da_hf.statistics.model_state import checkpointing_modules, prepared_for_pass


def hooks_of(module):
    return [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]


def state_of(model):
    """Return everything that an initialisation might disturb, but for the adapter's weights."""
    return {
        "hooks": [hooks_of(module) for module in model.modules()],
        "modules": [name for name, _ in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "dropouts": [
            (name, value)
            for module in model.modules()
            for name, value in sorted(vars(module).items())
            if isinstance(value, float)
        ],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "parameters": [id(parameter) for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.sum().item() for parameter in model.parameters()],
        "base": [p.sum().item() for name, p in model.named_parameters() if "lora_" not in name],
        "use_cache": model.config.use_cache,
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "grad_enabled": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }


@pytest.fixture
def disturbed(lora_model, tiny_llama):
    """Return a model in an unusual state: parts of it in evaluation mode, a foreign hook, odd dropouts, gradients."""

    def make(*, checkpointing=False, grads=False, **lora):
        model = lora_model(model=tiny_llama(attention_dropout=0.25), lora_dropout=0.1, **lora).train()
        base = model.base_model.model
        base.model.layers[0].eval()
        base.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        base.model.layers[1].mlp.gate_proj.lora_A["default"].weight.requires_grad_(False)
        base.config.use_cache = True
        if checkpointing:
            turn_checkpointing_on(base, reentrant=False)
        if grads:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        return model

    return make


def run(model, samples, **options):
    config = LoRADAConfig(search_samples=2, batch_size=3, **options.pop("settings", {}))
    return initialize_lora_da(model, samples, config=config, progress=False, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_a_run_that_succeeds_leaves_nothing_behind(disturbed, token_samples, checkpointing, grads):
    model = disturbed(checkpointing=checkpointing, grads=grads)
    state, adapter = state_of(model), adapter_weights(model)
    run(model, token_samples(16), settings={"step_size": 0.1})
    assert state_of(model) == state
    assert any(not torch.equal(value, adapter[name]) for name, value in adapter_weights(model).items())


class Failing:
    """A loss that fails at one of its calls, and counts them."""

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __call__(self, model, batch, num_items):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return model_loss(model, batch, num_items)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_failure_at_any_call_of_the_loss_leaves_nothing_behind(disturbed, token_samples, tmp_path, lora):
    counting, samples = Failing(), token_samples(16)
    other = disturbed(checkpointing=True, **lora)
    run(other, samples, compute_loss=counting)
    model = disturbed(checkpointing=True, **lora)
    state, before = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = counting.count
    for at in (1, 3, 5, 6, last // 2, last - 1, last):
        with pytest.raises(KeyboardInterrupt):
            run(model, samples, compute_loss=Failing(at), output_dir=tmp_path / "init")
        assert_same_tensors(model.state_dict(), before)
        assert state_of(model) == state
        assert not list(tmp_path.iterdir())
    run(model, samples)
    assert_same_tensors(adapter_weights(model), adapter_weights(other))


def test_what_a_loss_thaws_is_frozen_again_and_keeps_the_gradient_that_it_had(lora_model):
    """Losses that ask a reference model switch adapters on and off, which sets what is trained."""
    model = lora_model()
    trained = next(p for name, p in model.named_parameters() if "lora_B" in name)
    frozen = next(p for name, p in model.named_parameters() if "base_layer" in name)
    trained.grad = torch.ones_like(trained)
    with prepared_for_pass(model, seed=0):
        for parameter in (trained, frozen):
            parameter.requires_grad_(True)
            parameter.sum().backward()
    assert torch.equal(trained.grad, torch.ones_like(trained))
    assert trained.requires_grad
    assert frozen.grad is None
    assert not frozen.requires_grad


def test_the_auxiliary_loss_of_routers_is_off_and_said_to_be(lora_model):
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    torch.manual_seed(0)
    model = lora_model(model=MixtralForCausalLM(config), target_modules=["q_proj", "v_proj"])
    report = initialize_lora_da(model, make_learnable_samples(20), config=make_config(), progress=False)
    assert report.loss_reduction.startswith("sum")
    assert any("auxiliary loss" in note for note in report.notes)
    assert config.output_router_logits is True


def test_layers_that_a_config_drops_at_random_are_kept_and_there_are_no_embeddings_to_ask_for():
    model = FAMILIES["Wav2Vec2 (audio, padded)"].make_model().train()
    turn_checkpointing_on(model, reentrant=False)
    config = model.config
    config.layerdrop = 1.0  # every layer of an encoder in train mode
    speech = torch.randn(2, 400)
    with prepared_for_pass(model, seed=0):
        assert any(module.training for module in checkpointing_modules(model))
        found = model(speech).logits
    assert config.layerdrop == 1.0
    assert torch.allclose(found, model.eval()(speech).logits, atol=1e-6)
