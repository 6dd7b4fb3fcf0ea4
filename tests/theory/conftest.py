"""Random statistics of one layer, small enough for dense references in float64."""

import pytest
import torch

from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.guidance import Displacement, build_guidance
from lora_da_hf.theory.kronecker import factorize_input, inverse_output_factor


def make_problem(d_out=12, d_in=10, *, seed=0, tokens=60, samples=None, dtype=torch.float64):
    """Make the statistics of a layer with a decaying input spectrum; few ``samples`` make a gradient of low rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spectrum = torch.logspace(0, -2, d_in, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(d_in, d_in)).Q
    x = normal(tokens, d_in) * spectrum @ rotation
    g = normal(tokens, d_out) * (0.5 + torch.rand(d_out, generator=generator, dtype=torch.float64))
    count = tokens if samples is None else samples
    return LayerStatistics(
        input_second_moment=(x.mT @ x / tokens).to(dtype),
        output_grad_second_moment_diag=g.square().mean(0).to(dtype),
        weight_grad=(g[:count].mT @ x[:count] / count).to(dtype),
        num_input_tokens=tokens,
        num_output_tokens=tokens,
        input_mean=x.mean(0).to(dtype),
    )


def make_guidance(statistics, *, damping=1e-2, variance_weight=0.1, population_size=100, **overrides):
    """Build the guidance matrix of a layer with the same absolute damping for both factors."""
    rule = Damping(amount=damping)
    factorized = factorize_input(statistics.input_second_moment, rule, layer="a")
    y_inv, _ = inverse_output_factor(statistics.output_grad_second_moment_diag.double(), rule, layer="a")
    return build_guidance(
        Displacement(scaled_gradient=y_inv[:, None] * statistics.weight_grad, factorized_input=factorized),
        y_inv,
        population_size=population_size,
        variance_weight=variance_weight,
        **overrides,
    )


@pytest.fixture
def problem():
    """Return ``problem(d_out=12, d_in=10, *, seed=0, tokens=60, samples=None, dtype=float64)``."""
    return make_problem


@pytest.fixture
def guidance_of():
    """Return ``guidance_of(statistics, *, damping, variance_weight, population_size, **build_guidance arguments)``."""
    return make_guidance


@pytest.fixture
def projector():
    """Return a function that maps ``Q [d, r]`` with orthonormal columns to ``Q Q^T``."""
    return lambda basis: basis @ basis.mT


@pytest.fixture
def config():
    """Return a factory of configs with a fixed step, since these tests search none."""
    return lambda **settings: LoRADAConfig(**{"step_size": 0.1, **settings})
