"""Sums of products: half of them computed, in full precision."""

import pytest
import torch

from lora_da_hf.statistics.moments import (
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


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_and_unpacking_gives_the_matrix_back(width):
    rows = rows_of(3, width)
    matrix = rows.mT @ rows
    matrix = (matrix + matrix.mT) / 2
    packed = pack_upper(matrix)
    assert packed.shape == (width * (width + 1) // 2,)
    assert torch.equal(unpack_upper(packed, width), matrix)


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
