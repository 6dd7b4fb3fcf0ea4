"""Damping rules, and a Cholesky factorisation that never fails in silence."""

import pytest
import torch

from lora_da_hf.config import Damping
from lora_da_hf.theory.kronecker import damping_value, factorize_input


@pytest.mark.parametrize(
    ("damping", "expected"),
    [
        (Damping(amount=0.5), 0.5),
        (Damping(amount=0.5, reference="mean"), 0.5 * 2.75),
        (Damping(amount=0.5, reference="median"), 0.5 * 2.0),
    ],
)
def test_a_damping_rule_becomes_an_amount(damping, expected):
    assert damping_value(damping, torch.tensor([4.0, 1.0, 2.0, 4.0])) == pytest.approx(expected)


def test_where_a_factorisation_fails_the_damping_is_raised_tenfold_and_each_try_is_noted():
    moment = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    factorized = factorize_input(moment, Damping(amount=0.01), layer="a")
    assert factorized.damping == pytest.approx(1.0)
    assert factorized.notes == tuple(f"Cholesky with damping {tried} failed at pivot 2" for tried in (0.01, 0.1))


def test_a_rank_deficient_moment_without_damping_gets_some():
    moment = torch.ones(3, 3, dtype=torch.float64)
    factorized = factorize_input(moment, Damping(amount=0.0), layer="a")
    assert 0 < factorized.damping < 1e-3
    assert factorized.notes
    assert torch.isfinite(factorized.solve(moment)).all()
