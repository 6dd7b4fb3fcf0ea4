"""The displacement is the damped natural gradient step, and its norm is its largest singular value."""

import pytest
import torch

from lora_da_hf.config import Damping
from lora_da_hf.theory.guidance import Displacement
from lora_da_hf.theory.kronecker import FactorizedInput, factorize_input, inverse_output_factor


def displacement_of(statistics, *, input_damping, output_damping):
    factorized = factorize_input(statistics.input_second_moment, input_damping, layer="a")
    y_inv, _ = inverse_output_factor(statistics.output_grad_second_moment_diag, output_damping, layer="a")
    return Displacement(scaled_gradient=y_inv[:, None] * statistics.weight_grad, factorized_input=factorized)


def of_matrix(matrix):
    """Return the displacement with identities for both factors."""
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    factorized = FactorizedInput(cholesky=identity, damping=0.0)
    return Displacement(scaled_gradient=matrix, factorized_input=factorized)


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
    torch.testing.assert_close(found.dense(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 5), (5, 6), (1, 4), (4, 1)])
def test_products_with_vectors_are_those_of_the_dense_matrix(problem, d_out, d_in):
    found = displacement_of(problem(d_out, d_in), input_damping=Damping(amount=0.1), output_damping=Damping(amount=0.1))
    dense = found.dense()
    vectors = torch.randn(d_in, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(found.apply(vectors), dense @ vectors)
    gram = found.transposed_times_apply(found.factorized_input.solve(vectors))
    torch.testing.assert_close(gram, dense.mT @ dense @ vectors)
    assert found.norm() == pytest.approx(torch.linalg.svdvals(dense)[0].item(), rel=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 7), (60, 40), (500, 450), (30, 600)])
def test_the_spectral_norm_is_the_largest_singular_value_at_any_scale(shape, scale):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    assert of_matrix(matrix).norm() == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-9)
