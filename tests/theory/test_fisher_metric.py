"""The subspace in the Fisher norm, against dense computations with symmetric square roots."""

import dataclasses

import pytest
import torch

from lora_da_hf.theory.solve import factorize, solve_layer

RANK = 5


def solve(statistics, config, *, rank=RANK, population_size=100):
    factorized = factorize(statistics, config, layer="a")
    return solve_layer(statistics, factorized, config, layer="a", rank=rank, population_size=population_size)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.mT


def factors(statistics, solution):
    """Return the damped Fisher factors Y [d_out] and Z [d_in, d_in], and the displacement."""
    eye = torch.eye(statistics.input_second_moment.shape[0], dtype=torch.float64)
    z = statistics.input_second_moment + solution.input_damping * eye
    y = statistics.output_grad_second_moment_diag + solution.output_damping
    return y, z, -torch.linalg.solve(z, (statistics.weight_grad / y[:, None]).mT).mT


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 10), (3, 10), (20, 6)])
@pytest.mark.parametrize("layer_steps", ["equal", "displacement"])
def test_the_product_is_the_truncated_svd_mapped_back_at_every_rank(problem, config, d_out, d_in, layer_steps):
    statistics = problem(d_out, d_in)
    solution = solve(statistics, config(metric="fisher", layer_steps=layer_steps))
    y, z, step = factors(statistics, solution)
    whitened = y.sqrt()[:, None] * step @ power(z, 0.5)
    left, singular, right = torch.linalg.svd(whitened, full_matrices=False)
    divisor = solution.displacement_norm if layer_steps == "equal" else 1.0
    assert solution.displacement_norm == pytest.approx(torch.linalg.svdvals(step)[0].item())
    for rank in range(1, RANK + 1):
        kept = (left[:, :rank] * singular[:rank]) @ right[:rank]
        expected = kept / y.sqrt()[:, None] @ power(z, -0.5) / divisor
        basis_A, basis_B = solution.at_rank(rank)
        torch.testing.assert_close(basis_B @ basis_A, expected, rtol=1e-8, atol=1e-9 * expected.abs().max().item())


def test_rows_have_norm_one_and_are_orthogonal_under_the_input_factor(problem, config):
    statistics = problem()
    solution = solve(statistics, config(metric="fisher"))
    _, z, _ = factors(statistics, solution)
    torch.testing.assert_close(solution.basis_A.norm(dim=1), torch.ones(RANK, dtype=torch.float64))
    gram = solution.basis_A @ z @ solution.basis_A.mT
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)
    assert (solution.basis_A @ solution.basis_A.mT - torch.eye(RANK)).abs().max().item() > 1e-2


def test_no_other_matrix_of_that_rank_is_closer_in_the_fisher_norm(problem, config):
    statistics = problem()
    solution = solve(statistics, config(metric="fisher"))
    weights = solve(statistics, config(metric="weights", variance_weight=0.0))
    y, z, step = factors(statistics, solution)

    def missed(product):
        error = step - product
        return ((error @ z) * error * y[:, None]).sum().item()

    best = missed(solution.basis_B @ solution.basis_A)
    assert best < 0.99 * missed(weights.basis_B @ weights.basis_A)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nearby = solution.basis_A + 0.05 * torch.randn(solution.basis_A.shape, generator=generator, dtype=torch.float64)
        fitted = step @ z @ nearby.mT @ torch.linalg.inv(nearby @ z @ nearby.mT)  # the best B for this A
        assert missed(fitted @ nearby) >= best


def test_eigenvalues_are_the_squared_singular_values_less_a_share_of_the_parameters(problem, config):
    statistics = problem()
    settings = config(metric="fisher", bias_weight=2.0, variance_weight=0.5)
    solution = solve(statistics, settings, population_size=40)
    y, z, step = factors(statistics, solution)
    singular = torch.linalg.svdvals(y.sqrt()[:, None] * step @ power(z, 0.5))[:RANK]
    torch.testing.assert_close(solution.eigenvalues, 0.5 * 12 / 40 - 2.0 * singular**2)


def test_the_variance_term_changes_no_subspace(problem, config):
    found = [solve(problem(), config(metric="fisher", variance_weight=weight)) for weight in (0.0, 1.0, 100.0)]
    for other in found[1:]:
        torch.testing.assert_close(other.basis_A, found[0].basis_A, rtol=1e-7, atol=1e-9)
        assert (other.eigenvalues > found[0].eigenvalues).all()


def test_with_identity_factors_both_metrics_are_the_same(problem, config):
    statistics = dataclasses.replace(
        problem(),
        input_second_moment=torch.eye(10, dtype=torch.float64),
        output_grad_second_moment_diag=torch.ones(12, dtype=torch.float64),
    )
    undamped = {"input_damping": 0, "output_damping": 0}
    fisher, weights = (solve(statistics, config(metric=metric, **undamped)) for metric in ("fisher", "weights"))
    for name in ("basis_A", "basis_B", "eigenvalues"):
        torch.testing.assert_close(getattr(fisher, name), getattr(weights, name), rtol=1e-8, atol=1e-10)


def test_the_scale_of_inputs_and_loss_does_not_matter(problem, config):
    statistics = problem()
    scaled = dataclasses.replace(
        statistics,
        input_second_moment=statistics.input_second_moment * 1e4,
        output_grad_second_moment_diag=statistics.output_grad_second_moment_diag * 1e-6,
        weight_grad=statistics.weight_grad * 1e2 * 1e-3,
    )
    before, after = (solve(s, config(metric="fisher", layer_steps="equal")) for s in (statistics, scaled))
    torch.testing.assert_close(after.basis_B @ after.basis_A, before.basis_B @ before.basis_A, rtol=0, atol=1e-8)


@pytest.mark.parametrize("settings", [{"solve_dtype": "float32"}, {"solver": "krylov"}])
def test_narrower_and_faster_solves_give_the_same_product(problem, config, settings):
    statistics = problem(12, 60, tokens=200)
    exact = solve(statistics, config(metric="fisher", solver="eigh"))
    other = solve(statistics, config(metric="fisher", **settings))
    error = other.basis_B.double() @ other.basis_A.double() - exact.basis_B @ exact.basis_A
    assert error.norm() < 1e-3 * (exact.basis_B @ exact.basis_A).norm()


def test_directions_beyond_the_rank_of_the_gradient_carry_nothing(problem, config):
    solution = solve(problem(3, 10), config(metric="fisher", variance_weight=0.0))
    assert solution.basis_B[:, 3:].abs().max().item() < 1e-12
    assert torch.linalg.matrix_rank(solution.basis_A) == RANK
