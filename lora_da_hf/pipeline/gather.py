"""The stage that reads the data: the statistics pass over a window of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora_da_hf.errors import StatisticsError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.statistics.collect import PassResult, collect
from lora_da_hf.statistics.model_state import seed_generators
from lora_da_hf.statistics.taps import Taps

UNCALLED = "it is never called: no sample goes through it, or the model uses its weight in other code"
UNROUTED = "no token is routed to it"
NO_GRADIENT = "the loss does not depend on it"


@dataclass(frozen=True, kw_only=True)
class PassCounts:
    """What the passes of all processes over a window counted."""

    num_samples: int
    num_items: int
    num_unlabelled: int
    batch_size: int
    notes: tuple[str, ...]

    @classmethod
    def joined(cls, counts: Sequence[PassCounts]) -> PassCounts:
        """Return what the passes over all windows counted, which each saw the same samples."""
        notes = tuple(sorted({note for window in counts for note in window.notes}))
        if counts[0].num_unlabelled:
            notes += (f"{counts[0].num_unlabelled} samples have no label and were left out",)
        return replace(counts[0], batch_size=min(window.batch_size for window in counts), notes=notes)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a window's pass leaves in this process."""

    taps: Taps
    shared: dict[str, str]
    owners: dict[str, int]
    counts: PassCounts
    kept: dict[str, str]


def gather_statistics(job: Job, probe: Probe, plan: Plan, window: tuple[str, ...]) -> Gathered:
    """Run the pass for the layers of a window, over this process's share of the samples.

    The input of a group of layers is summed in the backward pass of its leader. Should a gradient reach a layer and not
    its leader, the pass is repeated with those layers apart.
    """
    shared = {name: leader for name, leader in probe.shared.items() if leader in window}
    result = _run_pass(job, probe, shared)
    apart = _groups_with_different_counts(job, result.taps, shared)
    notes: tuple[str, ...] = ()
    if apart:
        notes = (f"{len(apart)} layers that share an input got gradients on their own: collected again",)
        del result  # the sums go before the next ones are there
        shared = {name: name if leader in apart else leader for name, leader in shared.items()}
        result = _run_pass(job, probe, shared)
    mine = (result.num_samples, result.num_items, result.num_unlabelled, result.batch_size, {*notes, *result.notes})
    samples, items, unlabelled, sizes, of_each = zip(*job.processes.gather(mine), strict=True)
    counts = PassCounts(
        num_samples=sum(samples),
        num_items=sum(items),
        num_unlabelled=sum(unlabelled),
        batch_size=min(sizes),
        notes=tuple(set[str]().union(*of_each)),
    )
    return Gathered(
        taps=result.taps,
        shared=shared,
        owners={leader: plan.owners[probe.shared[leader]] for leader in shared.values()},
        counts=counts,
        kept=_without_gradient(job, result.taps),
    )


def _groups_with_different_counts(job: Job, taps: Taps, shared: dict[str, str]) -> set[str]:
    """Return the leaders of groups in which a layer that got gradients counted other tokens than the leader."""
    own = job.processes.sum([float(taps.taps[name].num_tokens) for name in shared])
    led = job.processes.sum([float(taps.taps[leader].num_tokens) for leader in shared.values()])
    return {leader for leader, mine, leads in zip(shared.values(), own, led, strict=True) if mine and mine != leads}


def _run_pass(job: Job, probe: Probe, shared: dict[str, str]) -> PassResult:
    mine = job.processes.share(probe.splits.statistics)

    def make_taps() -> Taps:
        return Taps(
            {name: job.targets[name].base_layer for name in shared},
            widths={name: (job.targets[name].in_features, job.targets[name].out_features) for name in shared},
            shared_inputs=shared,
            devices={name: job.targets[name].device for name in shared},
            dtype=torch.promote_types(torch.float32, next(iter(job.targets.values())).lora_A.dtype),
        )

    seed_generators(job.seed)  # a collator that draws gives the same batches again, whatever was run before
    with job.bar(len(mine), "LoRA-DA statistics") as bar, job.collate.generators_kept():
        return collect(
            job.model,
            mine,
            collate=job.collate,
            compute_loss=job.compute_loss,
            settings=probe.settings,
            make_taps=make_taps,
            on_samples=bar.update,
            lockstep=job.lockstep(probe.splits.statistics),
        )


def _without_gradient(job: Job, taps: Taps) -> dict[str, str]:
    """Find the layers that no sample went through, or that the loss does not depend on."""
    calls = job.processes.sum([float(tap.forward_calls) for tap in taps.taps.values()])
    returns = job.processes.sum([float(tap.backward_calls) for tap in taps.taps.values()])
    reasons: dict[str, str] = {}
    for name, called, returned in zip(taps.taps, calls, returns, strict=True):
        if not called:
            reasons[name] = UNROUTED if job.targets[name].is_routed else UNCALLED
        elif not returned:
            reasons[name] = NO_GRADIENT
    return reasons


def check_any_gradient(kept: Mapping[str, str], count: int) -> None:
    """Verify that a gradient came back to some layer, once all windows are done."""
    if sum(reason == UNCALLED for reason in kept.values()) == count:
        raise StatisticsError(
            f"No sample went through any of the {count} layers ({next(iter(kept))} first): their code is compiled or "
            "fused and goes around the modules. Initialise before torch.compile, and without fused kernels."
        )
    if sum(reason in (UNCALLED, UNROUTED, NO_GRADIENT) for reason in kept.values()) == count:
        raise StatisticsError(
            "No gradient came back to any tapped layer: the loss is cut off from the model (a detach, no_grad, or "
            "gradient checkpointing that starts from inputs without gradients). Check compute_loss."
        )
