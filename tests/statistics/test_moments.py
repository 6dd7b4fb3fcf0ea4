"""Sums of products: half of them computed, in full precision."""

import pytest
import torch
from harness import measured_tensors, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_da_hf.records import UpperTriangle
from lora_da_hf.statistics.moments import add_symmetric_product_, full_precision
from lora_da_hf.statistics.taps import Taps
from lora_da_hf.statistics.token_masks import BatchTokens


@pytest.mark.parametrize("width", [1, 5, 256, 257, 600, 1100])
def test_half_of_the_product_is_kept_and_gives_all_of_it(width):
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with measured_tensors() as peak:
        total = UpperTriangle.zeros(width, dtype=torch.float64, device=torch.device("cpu"))
        add_symmetric_product_(total, rows)
    assert peak[0] <= 8 * width * (width + total.block) // 2 + 64
    full = total.full()
    torch.testing.assert_close(full, rows.mT @ rows)
    assert torch.equal(full, full.mT)
    packed = total.packed()
    assert packed.shape == (width * (width + 1) // 2,)
    assert torch.equal(UpperTriangle(entries=packed, width=width, block=1).full(), full)


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


class ShapesMade(TorchDispatchMode):
    """Notes the shapes of the float32 tensors that operations make inside."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.seen.add(tuple(made.shape))
        return made


def sums_of(inputs, grads, scale, mask):
    """Return the sums of a tap on a layer that is fed these rows in batches, and the shapes that were made for them."""
    layer = nn.Linear(inputs.shape[1], grads.shape[1], dtype=inputs.dtype)
    widths, alone = {"layer": (inputs.shape[1], grads.shape[1])}, {"layer": "layer"}
    taps = Taps({"layer": layer}, widths=widths, shared_inputs=alone, devices={"layer": torch.device("cpu")})
    taps.tokens, taps.gradient_scale = BatchTokens(num_samples=1, label_counts=None, masks=(mask[None],)), scale
    with taps.attached(), ShapesMade() as made:
        for x, g in zip(inputs.split(len(mask)), grads.split(len(mask)), strict=True):
            layer(x).backward(g)
    tap = taps.taps["layer"]
    return (tap.weight_grad, tap.squares, tap.input_moment.full()), made.seen


@pytest.mark.skipif(not hasattr(torch.ops.aten.mm, "dtype"), reason="needs torch 2.8")
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 48.0)])
def test_half_precision_is_multiplied_as_it_is_and_summed_as_well_as_if_it_were_widened(dtype, scale):
    generator, spread, mask = torch.Generator().manual_seed(0), torch.logspace(-2, 1, 40), torch.arange(1_000) % 5 > 0
    inputs = (torch.randn(100_000, 40, generator=generator) * spread + 0.5 * spread.flip(0)).to(dtype)
    grads = (torch.randn(100_000, 24, generator=generator) * spread[:24]).to(dtype)
    x, g = inputs.double(), grads.double() / scale
    kept_x, kept_g = x[mask.repeat(100)], g[mask.repeat(100)]
    exact = (g.mT @ x, kept_g.square().sum(dim=0), kept_x.mT @ kept_x)
    widened, made = sums_of(inputs, grads, scale, mask)
    assert (1_000, 40) in made
    with torch.library._scoped_library("aten", "IMPL") as library:  # products that are exact, as a GPU's
        library.impl("mm.dtype", lambda left, right, dtype: left.to(dtype) @ right.to(dtype), "CPU")
        as_they_are, made = sums_of(inputs, grads, scale, mask)
    assert not {(rows, width) for rows in (800, 1_000) for width in (24, 40)} & made
    errors, before = (
        [relative_error(*pair) for pair in zip(sums, exact, strict=True)] for sums in (as_they_are, widened)
    )
    assert max(errors) < 2e-6
    assert all(errors[k] < 3 * before[k] for k in (0, 2))  # products; a GPU sums squares in another order than the CPU
