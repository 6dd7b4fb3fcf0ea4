"""Each start against a dense computation in numpy."""

import numpy as np
import pytest
import torch

from lora_da_hf.errors import NonFiniteError
from lora_da_hf.theory.solve import factorize, solve_layer
from lora_da_hf.theory.steps import split_factors

SHAPES = [(12, 10), (7, 40), (30, 500)]  # the last is solved by Krylov


@pytest.fixture
def start_of(config):
    """Return what solves a layer for a start, with full lengths."""

    def solve(statistics, start, rank=4, **settings):
        settings = config(start=start, **settings)
        factorized = factorize(statistics, settings, layer="a")
        return solve_layer(statistics, factorized, settings, layer="a", rank=rank, population_size=100)

    return solve


def assert_product(solution, rank, expected, tolerance=1e-5):
    rows, columns = solution.at_rank(rank)
    found = (columns.double() @ rows.double()).numpy()
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def truncated(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_gradient_is_its_truncated_svd_with_norm_one(problem, start_of, shape, rank):
    statistics = problem(*shape)
    grad = statistics.weight_grad.numpy()
    solution = start_of(statistics, "gradient")
    assert_product(solution, rank, -truncated(grad, rank) / np.linalg.norm(grad, 2))
    assert solution.displacement_norm == pytest.approx(np.linalg.norm(grad, 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_whitened_gradient_is_truncated_between_the_square_roots_of_both_factors(problem, start_of, shape, rank):
    statistics = problem(*shape)
    moment = statistics.input_second_moment.numpy()
    diagonal = statistics.output_grad_second_moment_diag.numpy()
    values, vectors = np.linalg.eigh(moment + 0.1 * moment.diagonal().mean() * np.eye(len(moment)))
    root = (vectors / np.sqrt(values)) @ vectors.T  # symmetric, where the package takes a Cholesky factor
    outer = 1 / np.sqrt(diagonal + 0.1 * diagonal.mean())
    whitened = outer[:, None] * statistics.weight_grad.numpy() @ root
    expected = -outer[:, None] * truncated(whitened, rank) @ root
    solution = start_of(statistics, "whitened_gradient")
    assert_product(solution, rank, expected)
    full = -outer[:, None] * whitened @ root
    assert solution.displacement_norm == pytest.approx(np.linalg.norm(full, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_are_their_principal_components_and_take_no_step(problem, start_of, shape):
    statistics = problem(*shape)
    mean = statistics.input_mean.numpy()
    covariance = statistics.input_second_moment.numpy() - np.outer(mean, mean)
    solution = start_of(statistics, "inputs")
    values, vectors = np.linalg.eigh(covariance)
    leading = vectors[:, ::-1][:, :4]
    cosines = np.linalg.svd(solution.basis_A.numpy() @ leading, compute_uv=False)
    assert cosines.min() > 1 - 1e-9
    assert -solution.eigenvalues.numpy() == pytest.approx(values[::-1][:4])
    assert not solution.basis_B.any()


@pytest.mark.parametrize("start", ["lora_da", "gradient", "whitened_gradient"])
@pytest.mark.parametrize("split", ["default_norm", "orthonormal", "balanced"])
def test_every_split_keeps_the_update_of_every_start(problem, start_of, start, split):
    solution = start_of(problem(3, 10), start)  # of which only three directions carry anything
    lora_A, lora_B = split_factors(
        solution.basis_A, solution.basis_B, peft_scaling=2.0, step_size=0.3, factor_split=split
    )
    torch.testing.assert_close(2.0 * lora_B @ lora_A, 0.3 * solution.basis_B @ solution.basis_A)


def test_inputs_that_are_not_finite_are_named(problem, start_of):
    statistics = problem()
    statistics.input_mean[0] = float("nan")
    with pytest.raises(NonFiniteError, match="inputs of a"):
        start_of(statistics, "inputs")
