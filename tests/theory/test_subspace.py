"""Extreme eigenvectors, exactly and by block Krylov; signs, completion and residuals."""

import pytest
import torch

from lora_da_hf.theory.subspace import block_krylov, exact_eigenpairs, leading_eigenpairs


def symmetric(eigenvalues, *, seed=0, dtype=torch.float64):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (rotation * values @ rotation.mT).to(dtype)


def decaying(dimension, **options):
    return symmetric(0.7 ** torch.arange(dimension, dtype=torch.float64), **options)


@pytest.mark.parametrize("solve", [exact_eigenpairs, block_krylov, leading_eigenpairs])
@pytest.mark.parametrize(("dimension", "count"), [(120, 1), (120, 5), (600, 5)])
def test_the_largest_eigenpairs_come_in_descending_order(projector, solve, dimension, count):
    matrix = decaying(dimension)
    pairs = solve(lambda v: matrix @ v, count, like=matrix)
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(pairs.eigenvalues, values.flip(0)[:count], rtol=0, atol=1e-9)
    torch.testing.assert_close(projector(pairs.vectors), projector(vectors[:, -count:]), rtol=0, atol=1e-6)
    assert pairs.residual <= 1e-7


def test_algebraically_largest_is_not_largest_in_magnitude(projector):
    matrix = symmetric([-100.0, *[0.5**k for k in range(99)]])
    for solve in (exact_eigenpairs, block_krylov):
        pairs = solve(lambda v: matrix @ v, 2, like=matrix)
        torch.testing.assert_close(pairs.eigenvalues, torch.tensor([1.0, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)


def test_krylov_that_does_not_converge_falls_back_to_an_exact_solve(projector):
    matrix = symmetric(torch.linspace(1.0, 1.1, 400))  # no gap anywhere
    assert block_krylov(lambda v: matrix @ v, 4, like=matrix).residual > 1e-7
    pairs = leading_eigenpairs(lambda v: matrix @ v, 4, like=matrix)
    assert pairs.solver == "eigh"
    assert pairs.residual <= 1e-7
    vectors = torch.linalg.eigh(matrix).eigenvectors
    torch.testing.assert_close(projector(pairs.vectors), projector(vectors[:, -4:]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("outlier", [1.0, 1e3])
def test_a_loose_tolerance_finds_the_directions_beside_an_outlier(projector, outlier):
    tail = torch.arange(1, 600, dtype=torch.float64) ** -0.7
    matrix = symmetric(torch.cat([tail.new_tensor([outlier]), 0.9 * tail]))
    pairs = leading_eigenpairs(lambda v: matrix @ v, 16, like=matrix, tolerance=1e-5)
    expected = projector(torch.linalg.eigh(matrix).eigenvectors[:, -16:])
    assert pairs.solver == "krylov"
    assert torch.linalg.matrix_norm(projector(pairs.vectors) - expected, ord=2) < 6e-3


@pytest.mark.parametrize("true_rank", [1, 3])
def test_krylov_stays_orthonormal_on_an_operator_of_lower_rank_than_asked(true_rank):
    matrix = symmetric([1.0 / (k + 1) for k in range(true_rank)] + [0.0] * (200 - true_rank))
    pairs = block_krylov(lambda v: matrix @ v, 8, like=matrix)
    assert pairs.residual <= 1e-7
    torch.testing.assert_close(pairs.vectors.mT @ pairs.vectors, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0)[:8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solve", [exact_eigenpairs, block_krylov])
def test_the_same_operator_gives_the_same_bits(solve):
    matrix = decaying(150)
    torch.manual_seed(1)
    first = solve(lambda v: matrix @ v, 4, like=matrix)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = solve(lambda v: matrix @ v, 4, like=matrix)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(torch.get_rng_state(), state)
