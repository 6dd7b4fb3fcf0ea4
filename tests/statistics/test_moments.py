"""Sums of products: half of them computed, in full precision."""

import subprocess
import sys

import pytest
import torch

from lora_da_hf.statistics.moments import (
    InputMomentSum,
    add_symmetric_product_,
    full_precision,
    mirror_upper_,
    pack_upper,
    unpack_upper,
)

WIDTHS = [1, 5, 256, 257, 600]


def rows_of(tokens, width, *, seed=0, dtype=torch.float64):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_half_product_mirrored_is_the_product(width):
    rows = rows_of(7, width)
    total = torch.zeros(width, width, dtype=torch.float64)
    add_symmetric_product_(total, rows)
    torch.testing.assert_close(total.triu(), (rows.mT @ rows).triu())
    torch.testing.assert_close(mirror_upper_(total), rows.mT @ rows)
    assert torch.equal(total, total.mT)


def test_only_the_upper_blocks_are_computed():
    total = torch.zeros(600, 600, dtype=torch.float64)
    add_symmetric_product_(total, rows_of(7, 600))
    assert not total[256:, :256].any()
    assert not total[512:, 256:512].any()
    assert total[:256, 512:].all()


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_and_unpacking_gives_the_matrix_back(width):
    rows = rows_of(3, width)
    matrix = rows.mT @ rows
    matrix = (matrix + matrix.mT) / 2
    packed = pack_upper(matrix)
    assert packed.shape == (width * (width + 1) // 2,)
    assert torch.equal(unpack_upper(packed, width), matrix)


def test_packing_needs_no_lower_triangle():
    rows = rows_of(9, 300)
    total = torch.zeros(300, 300, dtype=torch.float64)
    add_symmetric_product_(total, rows)
    torch.testing.assert_close(unpack_upper(pack_upper(total), 300), rows.mT @ rows)


def test_a_streamed_sum_is_the_product_of_the_stacked_rows():
    running = InputMomentSum(20, torch.float32, torch.device("cpu"))
    parts = [rows_of(n, 20, seed=n, dtype=torch.float32) for n in (1, 4, 0, 9)]
    for part in parts:
        running.add(part)
    stacked = torch.cat(parts).double()
    assert running.num_tokens == 14
    torch.testing.assert_close(mirror_upper_(running.total).double(), stacked.mT @ stacked, rtol=1e-5, atol=1e-5)


NEWER_FLAGS = """
import torch
from lora_da_hf.statistics.moments import full_precision

flags = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
{setting}
before = [flag.fp32_precision for flag in flags]
with full_precision("cpu"):
    assert [flag.fp32_precision for flag in flags[1:]] == ["ieee", "ieee"]
assert [flag.fp32_precision for flag in flags] == before
torch.backends.fp32_precision = "ieee"
assert ([flag.fp32_precision for flag in flags[1:]] == ["ieee", "ieee"]) == {follows}
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no such flags")
@pytest.mark.parametrize(
    ("setting", "follows"),
    [
        ('torch.backends.fp32_precision = "tf32"', True),  # transformers' tf32=True
        ('torch.backends.cuda.matmul.fp32_precision = "tf32"', False),
        ('torch.backends.mkldnn.matmul.fp32_precision = "bf16"', False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", False),  # of one backend, by the older kind
        ('torch.set_float32_matmul_precision("medium")', False),
    ],
)
def test_flags_of_either_kind_are_off_inside_and_restored_for_each_backend(setting, follows):
    code = NEWER_FLAGS.format(setting=setting, follows=follows)  # a process of its own: the two kinds do not mix
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_full_precision_is_on_inside_and_restored_even_after_an_error(before, float32_products):
    def check_and_fail():
        with full_precision("cpu"):
            assert float32_products() == "ieee"
            assert not torch.is_autocast_enabled("cpu")
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
            raise RuntimeError("inside")

    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(RuntimeError, match="inside"):
                check_and_fail()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(saved)
