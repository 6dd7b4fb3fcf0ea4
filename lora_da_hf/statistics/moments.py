"""Sums of products, accumulated in full precision whatever the model's dtype and the ambient precision flags."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.records import UpperTriangle


def stays_half(rows: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether rows in half precision are multiplied as they are into float32 sums: CUDA can, from torch 2.8 on.

    Such products are exact in float32, so nothing is gained where rows are widened first.
    """
    is_half = dtype == torch.float32 and rows.dtype in (torch.float16, torch.bfloat16)
    is_known = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return is_half and is_known and has_kernel("aten::mm.dtype", rows.device.type.upper())


def add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * left^T right`` to ``total``, of rows in its dtype or in half precision where that is multiplied."""
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right, alpha=scale)
    else:  # addmm takes float32 sums and rows in half precision from torch 2.10 on
        total.add_(torch.mm(left.mT, right, out_dtype=total.dtype), alpha=scale)


def add_symmetric_product_(total: UpperTriangle, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the upper block triangle of a ``[d, d]``, at about half the cost of all of it."""
    for start, strip in total.strips():
        add_product_(strip, rows[:, start : start + len(strip)], rows[:, start:])


class HostSums:
    """Adds what a CUDA device sums to sums in host memory, on a thread, while the device goes on.

    Two additions may be under way: they hold two products on the device beside the one that is made, and two in pinned
    memory.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._under_way: deque[Future[Tensor]] = deque()

    @contextlib.contextmanager
    def on(self, device: torch.device, total: Tensor) -> Generator[Tensor]:
        """Give the total, or zeros to be added to one in host memory; raise what an addition before raised."""
        if total.device == device:
            yield total
            return
        part = torch.zeros(total.shape, dtype=total.dtype, device=device)
        yield part
        pinned = self._under_way.popleft().result() if len(self._under_way) == 2 else total.new_empty(0)
        if pinned.numel() < part.numel():
            pinned = torch.empty(part.numel(), dtype=part.dtype, pin_memory=True)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with stream:
            copy = pinned[: part.numel()].view(part.shape).copy_(part, non_blocking=True)
            copied = stream.record_event()

        def add(_: Tensor) -> Tensor:  # the device cannot use the part's memory again before that
            copied.synchronize()
            total.add_(copy)
            return pinned

        self._under_way.append(self._worker.submit(add, part))

    def finish(self) -> None:
        """Wait until all is added, and raise what went wrong."""
        self._worker.shutdown()
        for addition in self._under_way:
            addition.result()


@contextlib.contextmanager
def full_precision(device_type: str) -> Generator[None]:
    """Turn autocast and reduced-precision float32 products (TF32, bf16) off, and restore both."""
    flags: Any = torch.backends
    with torch.autocast(device_type, enabled=False), contextlib.ExitStack() as after:
        if hasattr(flags, "fp32_precision"):
            # each by itself: torch.set_float32_matmul_precision sets both, so it cannot restore one that is set apart
            for backend in (flags.cuda.matmul, flags.mkldnn.matmul):
                follows = backend.fp32_precision == flags.fp32_precision
                after.callback(setattr, backend, "fp32_precision", "none" if follows else backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:  # torch before 2.9: one setting for all
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
