"""The product of the two factors is the step; how it is split is another matter."""

import math

import pytest
import torch

from lora_da_hf.theory.steps import DEFAULT_ROW_NORM, paper_step_size, split_factors

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


@pytest.mark.parametrize(("d_out", "rank"), [(12, 4), (2, 4)])
def test_balanced_gives_both_factors_the_same_singular_values(d_out, rank):
    lora_A, lora_B = split_factors(*bases(d_out, 10, rank), peft_scaling=4.0, step_size=0.3, factor_split="balanced")
    torch.testing.assert_close(lora_A @ lora_A.mT, lora_B.mT @ lora_B, rtol=0, atol=1e-12)
    torch.testing.assert_close(lora_A.norm(), lora_B.norm())
    assert lora_A.norm() > 0


def test_the_papers_gamma_divides_both_factors_by_its_root():
    basis_A, basis_B = bases(12, 10, 4)
    step = paper_step_size(peft_scaling=2.0, stable_gamma=16.0)
    lora_A, lora_B = split_factors(basis_A, basis_B, peft_scaling=2.0, step_size=step, factor_split="orthonormal")
    torch.testing.assert_close(lora_A, basis_A / 4)
    torch.testing.assert_close(lora_B, basis_B / 4)
