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


@pytest.mark.parametrize("width", [1, 5, 256, 257, 600])
def test_the_half_product_mirrored_is_the_product_and_can_be_packed(width):
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(width, width, dtype=torch.float64)
    add_symmetric_product_(total, rows)
    torch.testing.assert_close(total.triu(), (rows.mT @ rows).triu())
    torch.testing.assert_close(mirror_upper_(total), rows.mT @ rows)
    assert torch.equal(total, total.mT)
    packed = pack_upper(total)
    assert packed.shape == (width * (width + 1) // 2,)
    assert torch.equal(unpack_upper(packed, width), total)


def products_on_cpu():
    if hasattr(torch.backends, "fp32_precision"):
        return torch.backends.mkldnn.matmul.fp32_precision
    return {"highest": "ieee"}.get(torch.get_float32_matmul_precision(), "reduced")  # torch before 2.9


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_full_precision_is_on_inside_and_restored_even_after_an_error(before):
    def check_and_fail():
        with full_precision("cpu"):
            assert products_on_cpu() == "ieee"
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
