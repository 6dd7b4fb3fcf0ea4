"""Steps of A in coordinates in which the input is white, against the same steps in a parametrisation of its own."""

import pytest
import torch
from harness import LINEAR_LAYERS, collate, factors, make_args, make_learnable_samples
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from lora_da_hf import LoRADAConfig, apply_init
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.config import Damping
from lora_da_hf.errors import ArtifactError, ConfigError, SolveError, TargetError, UnsupportedSetupError
from lora_da_hf.theory.kronecker import inverse_root
from lora_da_hf.training.preconditioner import InputPreconditioner


@pytest.fixture
def trained(lora_model, stored_init):
    """Return a function that makes the model of the stored initialisation, which is the same each time."""

    def make(**config):
        model = lora_model(r=8)
        apply_init(model, stored_init, config=LoRADAConfig(**config) if config else None, progress=False)
        return model

    return make


def a_of(model):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name.removeprefix("base_model.model."): layer.lora_A["default"].weight for name, layer in layers.items()}


def moments_of(folder):
    stored = load_init(folder)
    return {name: found.input_second_moment for name, found in load_statistics(stored.folder, stored.manifest).items()}


def damped(moment, share=0.1):
    wide = moment.double()
    return wide + share * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def step(model, optimizer, samples):
    model(**collate(samples)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_gradient_descent_becomes_the_input_half_of_a_kfac_step(trained, stored_init):
    model, samples = trained(), make_learnable_samples(4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    preconditioner = InputPreconditioner.load(model, stored_init)
    preconditioner.attach(optimizer)
    assert sorted(preconditioner.layers) == sorted(a_of(model))
    assert len(preconditioner.layers) == LINEAR_LAYERS
    assert preconditioner.left_out == []
    before = {name: weight.detach().clone() for name, weight in a_of(model).items()}
    b_before = {name: b.clone() for name, b in factors(dict(model.named_parameters()), "B").items()}
    model(**collate(samples)).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in a_of(model).items()}
    b_gradients = {name: b.grad.clone() for name, b in factors(dict(model.named_parameters()), "B").items()}
    optimizer.step()
    moments = moments_of(stored_init)
    for name, weight in a_of(model).items():
        inverse = torch.linalg.inv(damped(moments[name]))
        inverse /= inverse.diagonal().mean()
        expected = before[name].double() - 0.1 * gradients[name].double() @ inverse
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6)
    for name, b in factors(dict(model.named_parameters()), "B").items():
        torch.testing.assert_close(b, b_before[name] - 0.1 * b_gradients[name])


class InWhite(nn.Module):
    """Computes ``A = white @ root`` for torch's own parametrisation."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def forward(self, white):
        return white @ self.root

    def right_inverse(self, weight):
        return weight @ torch.linalg.inv(self.root)


def test_adam_steps_as_it_does_on_a_parametrisation_of_a(trained, stored_init):
    hooked, plain = trained(), trained()
    moments = moments_of(stored_init)
    for name, layer in plain.named_modules():
        if isinstance(layer, LoraLayer):
            values, vectors = torch.linalg.eigh(damped(moments[name.removeprefix("base_model.model.")]))
            root = vectors @ torch.diag(values.rsqrt() / values.reciprocal().mean().sqrt()) @ vectors.mT
            nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", InWhite(root.float()))
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, eps=1e-12)
        for model in (hooked, plain)
    ]
    InputPreconditioner.load(hooked, stored_init).attach(optimizers[0])
    start = {name: weight.detach().clone() for name, weight in a_of(hooked).items()}
    for round_ in range(3):
        for model, optimizer in zip((hooked, plain), optimizers, strict=True):
            step(model, optimizer, make_learnable_samples(4, seed=round_))
    expected = a_of(plain)
    for name, weight in a_of(hooked).items():
        moved = expected[name] - start[name]
        assert (weight - expected[name]).norm() < 0.02 * moved.norm()
        assert moved.norm() > 0


def test_a_trainer_takes_the_optimizer(trained, stored_init, tmp_path):
    losses = []
    for preconditioned in (False, True):
        model = trained()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        if preconditioned:
            InputPreconditioner.load(model, stored_init).attach(optimizer)
        trainer = Trainer(
            model,
            make_args(tmp_path, max_steps=3),
            train_dataset=make_learnable_samples(12),
            data_collator=collate,
            optimizers=(optimizer, None),
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.5 * losses[0]


def test_a_model_may_move_once_it_is_attached(trained, stored_init):
    ends = []
    for moves in (False, True):
        model = trained()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        preconditioner = InputPreconditioner.load(model, stored_init)
        preconditioner.attach(optimizer)
        if moves:
            model.double()  # as a trainer moves it to its device, in place
        step(model, optimizer, make_learnable_samples(4))
        ends.append(a_of(model))
    for name, weight in ends[0].items():
        assert ends[1][name].dtype == torch.float64
        assert torch.allclose(ends[1][name].float(), weight, atol=1e-5), name


def test_layers_without_a_gradient_stay(trained, stored_init):
    model = trained()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    InputPreconditioner.load(model, stored_init).attach(optimizer)
    before = {name: weight.detach().clone() for name, weight in a_of(model).items()}
    optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in a_of(model).items())


def one_layer():
    """Return an A of its own with the preconditioner that covers it, and ``P``."""
    root = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
    weight = nn.Parameter(torch.eye(3)[:2].clone())
    return weight, InputPreconditioner({"layer": (weight, root)}, []), root


def test_a_gradient_is_the_same_after_a_step_so_that_a_second_step_transforms_it_once():
    weight, preconditioner, root = one_layer()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    preconditioner.attach(optimizer)
    start, gradient = weight.detach().clone(), torch.arange(6.0).reshape(2, 3)
    weight.grad = gradient.clone()
    kept = weight.grad
    for steps in (1, 2):
        optimizer.step()
        assert weight.grad is kept
        assert torch.equal(weight.grad, gradient)
        torch.testing.assert_close(weight.detach(), start - steps * 0.1 * gradient @ root @ root)


def test_a_closure_is_refused_before_anything_moves():
    weight, preconditioner, _ = one_layer()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    preconditioner.attach(optimizer)
    weight.grad = torch.ones(2, 3)
    start = weight.detach().clone()
    for step in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(UnsupportedSetupError, match=r"step\(closure\) .* Call the closure first"):
            step()
    assert torch.equal(weight, start)
    assert torch.equal(weight.grad, torch.ones(2, 3))
    optimizer.step(None)  # as accelerate calls it
    assert not torch.equal(weight, start)


def test_it_attaches_once():
    weight, preconditioner, _ = one_layer()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ConfigError, match="weight_decay"):
        preconditioner.attach(torch.optim.SGD([weight], lr=0.1, weight_decay=0.1))
    preconditioner.attach(optimizer)
    for other in (optimizer, torch.optim.SGD([weight], lr=0.1)):
        with pytest.raises(ConfigError, match="is attached to an optimizer already"):
            preconditioner.attach(other)


def test_what_cannot_be_preconditioned_is_an_error(trained, stored_init, lora_model):
    model = trained()
    preconditioner = InputPreconditioner.load(model, stored_init)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ConfigError, match=r"weight_decay=0.01 of lora_A of .*q_proj would decay it"):
        preconditioner.attach(torch.optim.AdamW(parameters, weight_decay=0.01))
    with pytest.raises(ConfigError, match=r"does not have lora_A of .*q_proj"):
        preconditioner.attach(torch.optim.AdamW(parameters[1:2], weight_decay=0.0))
    with pytest.raises(ConfigError, match="damping"):
        InputPreconditioner.load(model, stored_init, damping="much")
    frozen = trained(freeze_a=True)
    with pytest.raises(TargetError, match="for no A that is trained"):
        InputPreconditioner.load(frozen, stored_init)


def test_an_initialisation_without_statistics_is_an_error(trained, stored_init, tmp_path):
    from lora_da_hf import refit_init

    refit_init(stored_init, tmp_path / "bare", config=LoRADAConfig(factor_split="balanced"))
    with pytest.raises(ArtifactError, match="has no statistics"):
        InputPreconditioner.load(trained(), tmp_path / "bare")


def test_a_singular_moment_needs_damping():
    moment = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(SolveError, match="q_proj is singular with damping 0"):
        inverse_root(moment, Damping(amount=0.0), layer="q_proj")
    root = inverse_root(moment, Damping(amount=1.0), layer="q_proj")
    torch.testing.assert_close(root.diagonal().square(), torch.tensor([2 / 3, 4 / 3], dtype=torch.float64))
