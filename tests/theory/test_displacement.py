"""The displacement is the damped natural gradient step, and its norm is its largest singular value."""

import pytest
import torch

from lora_da_hf.config import Damping
from lora_da_hf.theory.displacement import displacement, spectral_norm
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, inverse_output_factor


def displacement_of(statistics, *, input_damping, output_damping):
    factorized = factorize_input(statistics.input_second_moment, input_damping, layer="a")
    y_inv, _ = inverse_output_factor(statistics.output_grad_second_moment_diag, output_damping, layer="a")
    return displacement(statistics.weight_grad, y_inv, factorized)


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 5), (5, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_it_solves_the_vectorised_kronecker_system(problem, d_out, d_in, damping):
    statistics = problem(d_out, d_in)
    found = displacement_of(
        statistics, input_damping=Damping(amount=damping), output_damping=Damping(amount=2 * damping)
    )
    z = statistics.input_second_moment + damping * torch.eye(d_in, dtype=torch.float64)
    y = torch.diag(statistics.output_grad_second_moment_diag + 2 * damping)
    # row-major vectorisation of [d_out, d_in]: (Y kron Z) vec(D) = vec(Y D Z)
    expected = torch.linalg.solve(torch.kron(y, z), -statistics.weight_grad.reshape(-1)).reshape(d_out, d_in)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_with_identity_factors_it_is_the_negative_gradient(problem):
    gradient = problem().weight_grad
    identity = FactorizedInput(cholesky=torch.eye(gradient.shape[1], dtype=torch.float64), damping=0.0)
    found = displacement(gradient, torch.ones(gradient.shape[0], dtype=torch.float64), identity)
    torch.testing.assert_close(found, -gradient)


def test_with_large_damping_it_is_the_gradient_divided_by_both_dampings(problem):
    statistics = problem()
    big = Damping(amount=1e6)
    found = displacement_of(statistics, input_damping=big, output_damping=big)
    torch.testing.assert_close(found * 1e12, -statistics.weight_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1), (1, 7), (60, 40), (500, 450), (30, 600)])
def test_the_spectral_norm_is_the_largest_singular_value(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.linalg.svdvals(matrix)[0].item()
    assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
@pytest.mark.parametrize("shape", [(20, 12), (450, 500)])
def test_the_spectral_norm_survives_any_scale_in_float32(shape, scale):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    expected = torch.linalg.svdvals(matrix.double())[0].item()
    assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-4)


def test_the_spectral_norm_of_close_singular_values_is_the_larger():
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(500, 500, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = torch.linspace(1.0, 0.9, 500, dtype=torch.float64)
    assert spectral_norm(left * values @ right) == pytest.approx(1.0, rel=1e-6)


def test_the_spectral_norm_of_zero_is_zero():
    assert spectral_norm(torch.zeros(4, 3)) == 0.0
