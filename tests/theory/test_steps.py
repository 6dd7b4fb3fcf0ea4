"""How far layers step beside each other, and how a step is split into two factors."""

import dataclasses
import math

import pytest
import torch

from lora_da_hf.pipeline.solve import reported
from lora_da_hf.report import LayerReport
from lora_da_hf.theory.solve import factorize, solve_layer
from lora_da_hf.theory.steps import DEFAULT_ROW_NORM, in_one_unit, rounding_notes, split_factors

RANK = 3


def solve(statistics, config, rank=RANK):
    factorized = factorize(statistics, config, layer="a")
    return solve_layer(statistics, factorized, config, layer="a", rank=rank, population_size=100)


def update(solution):
    return solution.basis_B @ solution.basis_A


def seeds(problem, settings, **options):
    return [solve(problem(seed=seed), settings, **options) for seed in range(3)]


def report(name, solution, num_grad_tokens):
    (d_out, rank), d_in = solution.basis_B.shape, solution.basis_A.shape[1]
    widths = {"in_features": d_in, "out_features": d_out, "rank": rank, "peft_scaling": 1.0, "num_tokens": 1}
    counts = {"num_grad_tokens": num_grad_tokens, "shares_input_with": name}
    return LayerReport(name=name, **widths, **counts, **reported(solution))


def scaled(solved, tokens=(1, 1, 1), layer_steps="displacement"):
    """Return the solutions and the reports of layers a, b and c once they have one unit, and the unit."""
    solutions = dict(zip("abc", solved, strict=True))
    layers = {n: report(n, one, count) for (n, one), count in zip(solutions.items(), tokens, strict=True)}
    return in_one_unit(solutions, layers, layer_steps=layer_steps)


def far(solution):
    return torch.linalg.matrix_norm(update(solution), ord=2).item()


@pytest.mark.parametrize("tokens", [(1, 1, 1), (40, 5, 200)])
def test_a_step_is_the_spectral_norm_of_the_farthest_layers_displacement_over_its_tokens(problem, config, tokens):
    settings = config(variance_weight=0.0)
    units = {}
    for rank in (1, RANK, 10):
        solved = seeds(problem, settings, rank=rank)
        after, layers, units[rank] = scaled(solved, tokens)
        assert units[rank] == max(one.displacement_norm / count for one, count in zip(solved, tokens, strict=True))
    assert units[1] == pytest.approx(units[RANK]) == pytest.approx(units[10])
    norms = [far(one) for one in after.values()]
    assert max(norms) == pytest.approx(1.0)  # at rank 10 the subspace is everything
    assert norms == pytest.approx([far(one) / count / units[10] for one, count in zip(solved, tokens, strict=True)])
    ratio = norms[0] / far(solved[0])
    torch.testing.assert_close(after["a"].eigenvalues, solved[0].eigenvalues * ratio**2)
    assert layers["a"].eigenvalues == after["a"].eigenvalues.tolist()


@pytest.mark.parametrize(("times", "moves"), [(50.0, 1.0), (1e6, 1e-3)])
def test_a_layer_of_which_the_gradient_is_rounding_hardly_moves(problem, config, times, moves):
    solved = seeds(problem, config(variance_weight=0.0), rank=10)
    longer = {"displacement_norm": solved[1].displacement_norm * times, "basis_B": solved[1].basis_B * times}
    solved[1] = dataclasses.replace(solved[1], **longer)
    after, layers, _ = scaled(solved)
    norms = {name: far(one) for name, one in after.items()}
    others = max(one.displacement_norm for one in (solved[0], solved[2]))
    notes = rounding_notes(layers.values(), layer_steps="displacement")
    if moves == 1.0:
        assert notes == []
        assert norms["b"] == pytest.approx(1.0)
        assert max(norms["a"], norms["c"]) == pytest.approx(others / solved[1].displacement_norm)
    else:
        assert notes[0].startswith(
            "b and 0 other layers hardly move: their displacements are more than 100 times as long"
        )
        assert norms["b"] <= moves
        assert max(norms["a"], norms["c"]) == pytest.approx(1.0)
    assert rounding_notes(layers.values(), layer_steps="equal") == []


def test_with_equal_steps_the_unit_is_each_layers_own(problem, config):
    solved = seeds(problem, config(layer_steps="equal", variance_weight=0.0))
    after, _, unit = scaled(solved, (40, 5, 200), layer_steps="equal")
    assert (unit, list(after.values())) == (1.0, solved)
    assert [far(solution) for solution in solved] == pytest.approx([1.0] * 3)


SPLITS = ["default_norm", "orthonormal", "balanced"]


def bases(d_out, d_in, rank):
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d_in, rank), (d_out, rank)))
    frame, basis_B = normal
    return torch.linalg.qr(frame).Q.mT.contiguous(), basis_B


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 10, 4), (2, 10, 4), (10, 4, 4), (1, 5, 1)])
def test_scaling_times_the_product_is_the_step_times_the_bases(split, d_out, d_in, rank):
    basis_A, basis_B = bases(d_out, d_in, rank)
    lora_A, lora_B = split_factors(basis_A, basis_B, peft_scaling=4.0, step_size=0.3, factor_split=split)
    assert lora_A.shape == (rank, d_in)
    assert lora_B.shape == (d_out, rank)
    torch.testing.assert_close(4.0 * lora_B @ lora_A, 0.3 * basis_B @ basis_A)


def test_default_norm_gives_a_the_rows_that_peft_gives_it():
    basis_A, basis_B = bases(12, 400, 8)
    lora_A, _ = split_factors(basis_A, basis_B, peft_scaling=2.0, step_size=0.1, factor_split="default_norm")
    rows = lora_A.norm(dim=1)
    torch.testing.assert_close(rows, torch.full_like(rows, 1 / math.sqrt(3)))
    default = torch.empty(8, 400)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(default, a=math.sqrt(5))
    assert default.norm(dim=1).mean().item() == pytest.approx(DEFAULT_ROW_NORM, rel=0.02)
