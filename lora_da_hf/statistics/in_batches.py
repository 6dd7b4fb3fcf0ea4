"""Whether a batch gives the sums of its samples: measured, since neither models nor losses say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lora_da_hf.statistics.batches import Lockstep
from lora_da_hf.statistics.collect import PassSettings, collect
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.taps import SizeTaps
from lora_da_hf.statistics.unlike import Collate

_TOLERANCE = 1e-2
_TOLERANCE_IN_HALF = 0.1
"""In half precision two passes differ by more. What goes wrong is off by more yet."""


def why_not_in_batches(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    make_taps: Callable[[], SizeTaps],
    lockstep: Lockstep,
) -> str | None:
    """Run a few samples as one batch and each alone, and compare what the layers would sum.

    A layer whose rows are taken for the wrong tokens, padding that is taken for tokens, a loss of another kind than it
    looks like, or one that goes around what is taken for the head: all of them show here. What depends on a coincidence
    of lengths in a later batch does not. The samples are a few that are as unlike as possible.

    Returns:
        Why the samples must run one at a time; None: they need not.
    """
    results = [
        collect(
            model,
            samples,
            collate=collate,
            compute_loss=compute_loss,
            settings=replace(settings, batch_size=size),
            make_taps=make_taps,
            on_samples=lambda _: None,
            lockstep=lockstep,
            by_length=False,
        )
        for size in (len(samples), 1)
    ]
    if results[0].why_single is not None:
        return results[0].why_single
    together, apart = (result.taps for result in results)
    assert isinstance(together, SizeTaps)
    assert isinstance(apart, SizeTaps)
    tolerance = _TOLERANCE_IN_HALF if together.saw_half else _TOLERANCE
    found, expected = together.sizes(), apart.sizes()
    for name in expected:
        counted = [taps.taps[name].sums.num_tokens for taps in (together, apart)]
        if counted[0] != counted[1]:
            return f"together, samples have {counted[0]} rows that count in {name}, and {counted[1]} apart"
        difference = (found[name] - expected[name]).abs() / expected[name].abs().clamp_min(1e-30)
        if not (difference <= tolerance).all():
            return f"what a batch sums in {name} is {difference.max().item():.0%} off the sum over its samples"
    return None
