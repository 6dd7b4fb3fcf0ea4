"""One layer from statistics to subspace: precision, notes, errors and invariances."""

import dataclasses

import pytest
import torch

from lora_da_hf import LoRADAConfig
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.solve import factorize, solve_layer


def solve(statistics, config, *, rank=4, population_size=100):
    factorized = factorize(statistics, config, layer="layers.3.q_proj")
    return solve_layer(
        statistics, factorized, config, layer="layers.3.q_proj", rank=rank, population_size=population_size
    )


def scaled(statistics, *, loss=1.0, inputs=1.0):
    return dataclasses.replace(
        statistics,
        input_second_moment=statistics.input_second_moment * inputs**2,
        output_grad_second_moment_diag=statistics.output_grad_second_moment_diag * loss**2,
        weight_grad=statistics.weight_grad * loss * inputs,
    )


def subspace(solution):
    return solution.basis_A.mT @ solution.basis_A


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 10, 4), (3, 10, 5), (10, 4, 4), (1, 6, 2)])
@pytest.mark.parametrize("layer_steps", ["equal", "displacement"])
def test_the_solution_has_pefts_layout_and_b_is_the_displacement_of_a(problem, config, d_out, d_in, rank, layer_steps):
    statistics = problem(d_out, d_in)
    solution = solve(statistics, config(layer_steps=layer_steps), rank=rank)
    assert solution.basis_A.shape == (rank, d_in)
    assert solution.basis_B.shape == (d_out, rank)
    assert solution.eigenvalues.shape == (rank,)
    gram = solution.basis_A @ solution.basis_A.mT
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    z = statistics.input_second_moment + solution.input_damping * torch.eye(d_in, dtype=torch.float64)
    y = statistics.output_grad_second_moment_diag + solution.output_damping
    step = -torch.linalg.solve(z, (statistics.weight_grad / y[:, None]).mT).mT
    assert solution.displacement_norm == pytest.approx(torch.linalg.svdvals(step)[0].item())
    if layer_steps == "equal":
        step = step / solution.displacement_norm
    torch.testing.assert_close(solution.basis_B, step @ solution.basis_A.mT, rtol=1e-8, atol=1e-10)
    noise = 0.03 * y.reciprocal().sum() / 100 * torch.linalg.inv(z)
    guidance = -step.mT @ step + noise / (solution.displacement_norm**2 if layer_steps == "equal" else 1)
    expected = torch.linalg.eigvalsh(guidance)[:rank]
    torch.testing.assert_close(solution.eigenvalues, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1e-5, 3.0, 1e4])
@pytest.mark.parametrize("what", ["loss", "inputs"])
def test_with_relative_damping_the_scale_does_not_matter(problem, config, what, scale):
    settings = config(variance_weight=1.0, layer_steps="equal")
    before, after = solve(problem(), settings), solve(scaled(problem(), **{what: scale}), settings)
    torch.testing.assert_close(subspace(after), subspace(before), rtol=0, atol=1e-8)
    torch.testing.assert_close(after.basis_B @ after.basis_A, before.basis_B @ before.basis_A, rtol=0, atol=1e-8)
    torch.testing.assert_close(after.eigenvalues, before.eigenvalues)


def test_float32_statistics_are_solved_in_float64(problem, config):
    solution = solve(problem(60, 420, tokens=600, samples=30, dtype=torch.float32), config(), rank=6)
    assert solution.basis_A.dtype == solution.basis_B.dtype == torch.float64
    assert solution.residual < 1e-7


def stretched(statistics, factor):
    return dataclasses.replace(statistics, weight_grad=statistics.weight_grad * factor)


@pytest.mark.parametrize("factor", [1e-12, 1e9, 1e15])
def test_normalised_terms_do_not_depend_on_the_length_of_the_gradient(problem, config, factor):
    settings = config(normalize_guidance_terms=True, layer_steps="equal")
    before, after = (solve(stretched(problem(), f), settings) for f in (1.0, factor))
    torch.testing.assert_close(subspace(after), subspace(before), rtol=0, atol=1e-8)
    torch.testing.assert_close(after.eigenvalues, before.eigenvalues, rtol=1e-8, atol=0)


@pytest.mark.parametrize("settings", [{}, {"normalize_guidance_terms": True}, {"variance_weight": 0.0}])
@pytest.mark.parametrize("shape", [(12, 10), (60, 420)])
def test_what_overflows_is_an_error(problem, config, settings, shape):
    with pytest.raises((SolveError, NonFiniteError), match=r"layers\.3\.q_proj .* Raise input_damping"):
        solve(stretched(problem(*shape), 1e200), config(**settings))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("weight_grad", r"gradients of layers\.3\.q_proj are not finite"),
        ("input_second_moment", r"input second moment of layers\.3\.q_proj is not finite"),
        ("output_grad_second_moment_diag", r"gradients of layers\.3\.q_proj are not finite"),
    ],
)
def test_a_statistic_that_is_not_finite_is_named(problem, config, field, message):
    statistics = problem()
    value = getattr(statistics, field).clone()
    value.view(-1)[1] = torch.nan
    with pytest.raises(NonFiniteError, match=message):
        solve(dataclasses.replace(statistics, **{field: value}), config())


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(512, 1, 8), (768, 4, 32)])
def test_directions_beyond_the_rank_of_the_displacement_are_the_exact_ones(d_in, d_out, rank):
    """Only the small variance term tells them apart, which a residual relative to the largest eigenvalue does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, d_in, generator=generator, dtype=torch.float64) * torch.arange(1, d_in + 1) ** -0.5
    g = torch.randn(4000, d_out, generator=generator, dtype=torch.float64) * 1e-4
    statistics = LayerStatistics(
        input_second_moment=x.mT @ x / 4000,
        output_grad_second_moment_diag=g.square().mean(dim=0),
        weight_grad=g.mT @ x / 64,
        num_input_tokens=4000,
        num_output_tokens=4000,
    )
    found = solve(statistics, LoRADAConfig(), rank=rank, population_size=256)
    z = statistics.input_second_moment + found.input_damping * torch.eye(d_in, dtype=torch.float64)
    y = statistics.output_grad_second_moment_diag + found.output_damping
    step = torch.linalg.solve(z, (statistics.weight_grad / y[:, None]).mT).mT
    guidance = 0.03 * y.reciprocal().sum() / 256 * torch.linalg.inv(z) - step.mT @ step
    exact = torch.linalg.eigh(guidance).eigenvectors[:, :rank]
    assert torch.linalg.svdvals(found.basis_A @ exact).min() > 0.999
