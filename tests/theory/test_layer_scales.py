"""How far layers step beside each other."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lora_da_hf.theory.solve import factorize, solve_layer
from lora_da_hf.theory.steps import divisors, layer_lengths, rounding_notes, step_unit

RANK = 3


def solve(statistics, config, rank=RANK):
    factorized = factorize(statistics, config, layer="a")
    return solve_layer(statistics, factorized, config, layer="a", rank=rank, population_size=100)


def update(solution):
    return solution.basis_B @ solution.basis_A


def test_the_direction_and_the_eigenvalues_are_those_of_the_displacement(problem, config):
    plain = solve(problem(), config())
    scaled = solve(problem(), config(layer_steps="equal"))
    torch.testing.assert_close(scaled.basis_A, plain.basis_A)
    ratio = (scaled.basis_B.norm() / plain.basis_B.norm()).item()
    torch.testing.assert_close(scaled.basis_B, ratio * plain.basis_B)
    torch.testing.assert_close(scaled.eigenvalues, ratio**2 * plain.eigenvalues)
    assert scaled.displacement_norm == pytest.approx(plain.displacement_norm)


def seeds(problem, settings, **options):
    return [solve(problem(seed=seed), settings, **options) for seed in range(3)]


def reports(solutions, tokens=(1, 1, 1)):
    return [
        SimpleNamespace(name=name, displacement_norm=solution.displacement_norm, num_grad_tokens=count)
        for name, solution, count in zip("abc", solutions, tokens, strict=True)
    ]


def far(solution):
    return torch.linalg.matrix_norm(update(solution), ord=2).item()


@pytest.mark.parametrize("tokens", [(1, 1, 1), (40, 5, 200)])
def test_a_step_is_the_spectral_norm_of_the_farthest_layers_displacement_over_its_tokens(problem, config, tokens):
    settings = config(variance_weight=0.0)
    units = {}
    for rank in (1, RANK, 10):
        solved = seeds(problem, settings, rank=rank)
        layers = reports(solved, tokens)
        units[rank] = step_unit(layers, layer_steps="displacement")
        assert units[rank] == max(one.displacement_norm / count for one, count in zip(solved, tokens, strict=True))
    assert units[1] == pytest.approx(units[RANK]) == pytest.approx(units[10])
    by_layer = divisors(layers, units[10], layer_steps="displacement")
    norms = [far(one.in_unit(by_layer[name])) for name, one in zip("abc", solved, strict=True)]
    assert max(norms) == pytest.approx(1.0)  # at rank 10 the subspace is everything
    assert norms == pytest.approx([far(one) / count / units[10] for one, count in zip(solved, tokens, strict=True)])
    torch.testing.assert_close(solved[0].in_unit(units[10]).eigenvalues * units[10] ** 2, solved[0].eigenvalues)


@pytest.mark.parametrize(("times", "moves"), [(50.0, 1.0), (1e6, 1e-3)])
def test_a_layer_of_which_the_gradient_is_rounding_hardly_moves(problem, config, times, moves):
    solved = seeds(problem, config(variance_weight=0.0), rank=10)
    longer = {"displacement_norm": solved[1].displacement_norm * times, "basis_B": solved[1].basis_B * times}
    solved[1] = dataclasses.replace(solved[1], **longer)
    layers = reports(solved)
    lengths = layer_lengths(layers, layer_steps="displacement")
    unit = step_unit(layers, layer_steps="displacement")
    by_layer = divisors(layers, unit, layer_steps="displacement")
    norms = {name: far(one.in_unit(by_layer[name])) for name, one in zip("abc", solved, strict=True)}
    others = max(one.displacement_norm for one in (solved[0], solved[2]))
    notes = rounding_notes(layers, layer_steps="displacement")
    if moves == 1.0:
        assert notes == []
        assert norms["b"] == pytest.approx(1.0)
        assert max(norms["a"], norms["c"]) == pytest.approx(others / lengths["b"])
    else:
        assert notes[0].startswith(
            "b and 0 other layers hardly move: their displacements are more than 100 times as long"
        )
        assert norms["b"] <= moves
        assert max(norms["a"], norms["c"]) == pytest.approx(1.0)
    assert rounding_notes(layers, layer_steps="equal") == []


def test_with_equal_steps_the_unit_is_each_layers_own(problem, config):
    solved = seeds(problem, config(layer_steps="equal", variance_weight=0.0))
    layers = reports(solved, (40, 5, 200))
    assert step_unit(layers, layer_steps="equal") == 1.0
    assert divisors(layers, 1.0, layer_steps="equal") == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert [far(solution) for solution in solved] == pytest.approx([1.0] * 3)
    assert solved[0].in_unit(1.0) is solved[0]
