"""The guidance matrix, and that no other subspace of the same rank scores lower on it."""

import pytest
import torch

from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.guidance import lowest_subspace

WEIGHTS = [0.0, 0.03, 1.0, 10.0]


def random_frame(dimension, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, rank, generator=generator, dtype=torch.float64)).Q


def dense_of(guidance):
    """Return G, made of dense matrices."""
    z = guidance.displacement.factorized_input
    z_inv = torch.linalg.inv(z.cholesky @ z.cholesky.mT)
    displacement = -guidance.displacement.scaled_gradient @ z_inv
    return guidance.variance_coefficient * z_inv - displacement.mT @ displacement


def objective(guidance, basis):
    """Return ``trace(Q^T G Q)``: lower is better."""
    return (basis * guidance.apply(basis)).sum().item()


@pytest.mark.parametrize("variance_weight", WEIGHTS)
def test_it_is_the_papers_formula(problem, guidance_of, variance_weight):
    statistics = problem()
    guidance = guidance_of(statistics, damping=1e-2, variance_weight=variance_weight, population_size=50)
    z_inv = torch.linalg.inv(statistics.input_second_moment + 1e-2 * torch.eye(10, dtype=torch.float64))
    y_inv = 1 / (statistics.output_grad_second_moment_diag + 1e-2)
    step = -y_inv[:, None] * statistics.weight_grad @ z_inv
    sigma = torch.linalg.svdvals(step)[0]
    unit = step / sigma
    expected = -unit.mT @ unit + variance_weight * y_inv.sum() / (50 * sigma**2) * z_inv
    vectors = random_frame(10, 3, 0)
    torch.testing.assert_close(guidance.apply(vectors) / sigma**2, expected @ vectors, rtol=1e-9, atol=1e-11)
    assert objective(guidance, vectors) / sigma.item() ** 2 == pytest.approx(
        torch.trace(vectors.mT @ expected @ vectors).item()
    )


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 10), (10, 12)])
def test_normalised_terms_have_one_frobenius_norm(problem, guidance_of, d_out, d_in):
    guidance = guidance_of(problem(d_out, d_in), variance_weight=2.0, normalize_terms=True)
    unit = torch.eye(d_in, dtype=torch.float64)
    displacement = guidance.displacement.apply(unit)
    variance = (guidance.variance_coefficient * guidance.displacement.factorized_input.solve(unit)).norm().item()
    assert variance == pytest.approx(2.0 * (displacement.mT @ displacement).norm().item())


@pytest.mark.parametrize("variance_weight", WEIGHTS)
def test_the_subspace_is_that_of_the_dense_lowest_eigenvectors(problem, guidance_of, projector, variance_weight):
    guidance = guidance_of(problem(), variance_weight=variance_weight)
    pairs = lowest_subspace(guidance, 4)
    values, vectors = torch.linalg.eigh(dense_of(guidance))
    torch.testing.assert_close(projector(pairs.vectors), projector(vectors[:, :4]), rtol=0, atol=1e-9)
    torch.testing.assert_close(pairs.eigenvalues, values[:4], rtol=1e-9, atol=1e-11)
    assert objective(guidance, pairs.vectors) == pytest.approx(values[:4].sum().item(), rel=1e-9)


@pytest.mark.parametrize("d_in", [120, 420])
@pytest.mark.parametrize("variance_weight", [0.0, 0.03])
def test_the_basis_of_a_smaller_rank_is_the_first_columns_of_a_larger_one(problem, guidance_of, variance_weight, d_in):
    guidance = guidance_of(problem(30, d_in, tokens=200, samples=6), damping=0.1, variance_weight=variance_weight)
    large = lowest_subspace(guidance, 12, 1e-10)
    for rank in (1, 4, 8):
        small = lowest_subspace(guidance, rank, 1e-10)
        torch.testing.assert_close(small.vectors, large.vectors[:, :rank], rtol=0, atol=1e-5)
        torch.testing.assert_close(small.eigenvalues, large.eigenvalues[:rank], rtol=0, atol=1e-9)
    assert (large.eigenvalues.diff() >= -1e-12).all()


def test_a_small_singular_value_is_no_null_direction(guidance_of):
    left, right = random_frame(60, 40, 0), random_frame(420, 40, 1)
    singular = torch.arange(1, 41, dtype=torch.float64) ** -1.75  # the last that is asked for is 0.3 % of the first
    statistics = LayerStatistics(
        input_second_moment=torch.eye(420),
        output_grad_second_moment_diag=torch.ones(60),
        weight_grad=(left * singular @ right.mT).float(),
        num_input_tokens=1,
        num_output_tokens=1,
    )
    pairs = lowest_subspace(guidance_of(statistics, damping=0.0, variance_weight=0.0), 28)
    torch.testing.assert_close(pairs.eigenvalues, -singular[:28].square(), rtol=2e-4, atol=0)
    kept = (right[:, :28].mT @ pairs.vectors).norm(dim=1)
    torch.testing.assert_close(kept, torch.ones(28, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_what_rounding_adds_to_a_gradient_of_low_rank_moves_nothing(problem, guidance_of, damping):
    statistics = problem(60, 40, samples=3, dtype=torch.float32)  # as statistics are summed
    guidance = guidance_of(statistics, damping=damping, variance_weight=0.0)
    pairs = lowest_subspace(guidance, 6)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(pairs.vectors.mT @ pairs.vectors, identity, rtol=0, atol=1e-12)
    left = guidance.displacement.apply(pairs.vectors).norm(dim=0)
    assert (left[3:] < 1e-3 * left[0]).all()
