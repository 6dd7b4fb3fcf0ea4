"""The length of a layer's step and the norm of its rows, against data that the loss is known for."""

import dataclasses
import math

import pytest
import torch

from lora_da_hf.errors import SolveError
from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.layer_scales import quadratic_length, row_scale, step_unit
from lora_da_hf.theory.solve import factorize, solve_layer

TOKENS, D_IN, D_OUT, RANK = 40, 10, 6, 3


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def inputs():
    return normal(TOKENS, D_IN, seed=0) * torch.logspace(0, -2, D_IN, dtype=torch.float64) * 5


@pytest.fixture
def targets(inputs):
    return inputs @ normal(D_IN, D_OUT, seed=1) + 0.1 * normal(TOKENS, D_OUT, seed=2)


@pytest.fixture
def regression(inputs, targets):
    """Statistics of a linear regression at W = 0 with unit noise in every output, whose Fisher information is exact."""
    return LayerStatistics(
        input_second_moment=inputs.mT @ inputs / TOKENS,
        output_grad_second_moment_diag=torch.ones(D_OUT, dtype=torch.float64),
        weight_grad=-targets.mT @ inputs / TOKENS,
        num_input_tokens=TOKENS,
        num_output_tokens=TOKENS,
    )


def solve(statistics, config, rank=RANK):
    factorized = factorize(statistics, config, layer="a")
    return solve_layer(statistics, factorized, config, layer="a", rank=rank, population_size=100)


def update(solution):
    return solution.basis_B @ solution.basis_A


@pytest.mark.parametrize("metric", ["weights", "fisher"])
@pytest.mark.parametrize("damping", ["0.1*mean", "10*mean", 1e-6])
def test_the_length_is_where_the_loss_of_a_regression_is_lowest(regression, inputs, targets, config, metric, damping):
    settings = {"metric": metric, "input_damping": damping, "output_damping": damping}
    step = update(solve(regression, config(layer_steps="quadratic", **settings)))

    def loss(length):  # a parabola, so three points say where it is lowest
        return 0.5 * (inputs @ (length * step).mT - targets).square().sum(dim=1).mean().item()

    below, at, above = loss(TOKENS - 1.0), loss(float(TOKENS)), loss(TOKENS + 1.0)
    best = TOKENS + 0.5 * (below - above) / (below - 2 * at + above)
    assert best == pytest.approx(TOKENS, rel=1e-6)  # the tokens, which all layers share, are left to the search
    assert at < loss(0.0)


def test_the_direction_and_the_eigenvalues_are_those_of_the_displacement(problem, config):
    plain = solve(problem(), config())
    for layer_steps in ("quadratic", "equal"):
        scaled = solve(problem(), config(layer_steps=layer_steps))
        torch.testing.assert_close(scaled.basis_A, plain.basis_A)
        ratio = (scaled.basis_B.norm() / plain.basis_B.norm()).item()
        torch.testing.assert_close(scaled.basis_B, ratio * plain.basis_B)
        torch.testing.assert_close(scaled.eigenvalues, ratio**2 * plain.eigenvalues)
        assert scaled.displacement_norm == pytest.approx(plain.displacement_norm)


def test_the_length_makes_up_for_the_damping_of_outputs(regression, config):
    lengths = {}
    for layer_steps in ("displacement", "quadratic"):
        settings = {"layer_steps": layer_steps, "variance_weight": 0.0}
        found = [update(solve(regression, config(output_damping=d, **settings))).norm() for d in (0.0, 9.0)]
        lengths[layer_steps] = (found[1] / found[0]).item()
    assert lengths["displacement"] == pytest.approx(0.1)
    assert lengths["quadratic"] == pytest.approx(1.0)


def test_without_damping_all_layers_go_as_far_as_the_displacement_in_the_fisher_metric(problem, config):
    settings = {"metric": "fisher", "input_damping": 0.0, "output_damping": 0.0}
    for seed in range(2):
        statistics = problem(seed=seed)
        plain, scaled = (
            solve(statistics, config(layer_steps=steps, **settings)) for steps in ("displacement", "quadratic")
        )
        torch.testing.assert_close(statistics.num_output_tokens * scaled.basis_B, plain.basis_B)


def seeds(problem, settings, **options):
    return [solve(problem(seed=seed), settings, **options) for seed in range(3)]


def far(solution):
    return torch.linalg.matrix_norm(update(solution), ord=2).item()


@pytest.mark.parametrize("metric", ["weights", "fisher"])
def test_a_step_is_the_spectral_norm_of_the_farthest_layers_displacement(problem, config, metric):
    settings = config(metric=metric, variance_weight=0.0)
    units = {}
    for rank in (1, RANK, 10):
        solved = seeds(problem, settings, rank=rank)
        units[rank] = step_unit(solved, layer_steps="displacement")
        assert units[rank] == max(solution.displacement_norm for solution in solved)
    assert units[1] == pytest.approx(units[RANK]) == pytest.approx(units[10])
    norms = [far(solution.in_unit(units[10])) for solution in solved]  # at rank 10 the subspace is everything
    assert max(norms) == pytest.approx(1.0)
    assert norms == pytest.approx([far(solution) / units[10] for solution in solved])
    torch.testing.assert_close(solved[0].in_unit(units[10]).eigenvalues * units[10] ** 2, solved[0].eigenvalues)


def test_with_quadratic_steps_the_unit_is_that_of_the_update(problem, config):
    solved = seeds(problem, config(layer_steps="quadratic"))
    unit = step_unit(solved, layer_steps="quadratic")
    assert max(far(solution.in_unit(unit)) for solution in solved) == pytest.approx(1.0)


def test_with_equal_steps_the_unit_is_each_layers_own(problem, config):
    solved = seeds(problem, config(layer_steps="equal", variance_weight=0.0))
    assert step_unit(solved, layer_steps="equal") == 1.0
    assert [far(solution) for solution in solved] == pytest.approx([1.0] * 3)
    assert solved[0].in_unit(1.0) is solved[0]


@pytest.mark.parametrize("norm", [0.0, 1e-200, 1e200, math.inf])
def test_a_unit_that_nothing_can_be_divided_by_is_an_error(problem, config, norm):
    solution = dataclasses.replace(solve(problem(), config()), displacement_norm=norm)
    with pytest.raises(SolveError, match=r"would go .* far in one step. Raise the dampings."):
        step_unit([solution], layer_steps="displacement")


def test_layers_that_see_half_of_the_tokens_go_twice_as_far(problem):
    statistics = problem()
    basis_A, basis_B = torch.eye(RANK, 10, dtype=torch.float64), -statistics.weight_grad[:, :RANK]
    whole = quadratic_length(statistics, basis_A, basis_B, layer="a")
    half = dataclasses.replace(statistics, num_output_tokens=statistics.num_output_tokens // 2)
    assert quadratic_length(half, basis_A, basis_B, layer="a") == pytest.approx(2 * whole)


def test_an_update_along_which_the_loss_does_not_fall_has_no_length(problem):
    statistics = problem()
    basis_A = torch.eye(RANK, 10, dtype=torch.float64)
    with pytest.raises(SolveError, match=r"q_proj: the loss has slope 0.* gives no length. Use another layer_steps"):
        quadratic_length(statistics, basis_A, torch.zeros(12, RANK, dtype=torch.float64), layer="q_proj")
    with pytest.raises(SolveError, match=r"the loss has slope [0-9.]+ and"):
        quadratic_length(statistics, basis_A, statistics.weight_grad[:, :RANK], layer="q_proj")


@pytest.mark.parametrize("metric", ["weights", "fisher"])
@pytest.mark.parametrize("wanted", [0.05, 2.0])
def test_the_input_of_b_has_the_root_mean_square_that_is_asked_for(regression, inputs, config, metric, wanted):
    solution = solve(regression, config(projected_rms=wanted, metric=metric))
    lora_A = solution.basis_A / math.sqrt(3)  # as factor_split="default_norm" writes it
    assert (inputs @ lora_A.mT).square().mean().sqrt().item() == pytest.approx(wanted)
    rows = lora_A.norm(dim=1)
    torch.testing.assert_close(rows, rows[:1].expand(RANK))
    plain = solve(regression, config(metric=metric))
    torch.testing.assert_close(update(solution), update(plain))
    torch.testing.assert_close(solution.eigenvalues, plain.eigenvalues)


def test_an_input_that_does_not_vary_along_a_has_no_scale(problem):
    statistics = dataclasses.replace(problem(), input_second_moment=torch.zeros(10, 10, dtype=torch.float64))
    with pytest.raises(SolveError, match=r"q_proj: its input has the mean square 0 along the rows of A"):
        row_scale(statistics, torch.eye(RANK, 10, dtype=torch.float64), 0.3, layer="q_proj")
