"""The stage that reads the data: the statistics pass over a window of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import TapNotCalledError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.statistics.collect import PassResult, collect
from lora_da_hf.statistics.model_state import seed_generators
from lora_da_hf.statistics.pass_state import PassStore
from lora_da_hf.statistics.taps import Taps


@dataclass(frozen=True, kw_only=True)
class PassCounts:
    """What the passes of all processes over a window counted."""

    num_samples: int
    num_items: int
    num_unlabelled: int
    batch_size: int
    notes: list[str]


@dataclass(kw_only=True)
class Gathered:
    """What a window's pass leaves in this process.

    Attributes:
        result: The sums; None if this process had no layer in the window.
        ranks: The processes whose sums belong together.
        shared: The leader of each layer that was collected.
        owners: Which of these processes solves each leader's group.
        counts: What was counted.
        kept: Layers that cannot be initialised, with the reason.
    """

    result: PassResult | None
    ranks: Ranks
    shared: dict[str, str]
    owners: dict[str, int]
    counts: PassCounts
    kept: dict[str, str]


def gather_statistics(
    job: Job, probe: Probe, plan: Plan, window: tuple[str, ...], store: PassStore | None = None
) -> Gathered:
    """Run the pass for the layers of a window, over this process's part of the work.

    The input of a group of layers is summed in the backward pass of its leader. Should a gradient reach a layer and not
    its leader, the pass is repeated with those layers apart.

    Args:
        job: The job.
        probe: What the probe found.
        plan: Who does what.
        window: The leaders of the groups to collect.
        store: Where this process keeps the state of the pass; None: nowhere.
    """
    ranks = job.ranks if plan.schedule == "samples" else Ranks.alone()  # with its own layers each is alone
    mine = {leader for leader in window if plan.schedule == "samples" or plan.owners[leader] == job.ranks.rank}
    shared = {name: leader for name, leader in probe.shared.items() if leader in mine}
    result, kept = None, {}
    with job.stage("statistics"), job.ranks.together("statistics pass"):
        if shared:
            result = _run_pass(job, ranks, probe, shared, store)
            apart = _groups_with_different_counts(ranks, result.taps, shared)
            if apart:
                note = f"{len(apart)} layers that share an input got gradients on their own: collected again"
                notes, result = [*result.notes, note], None  # the sums go before the next ones are there
                shared = {name: name if leader in apart else leader for name, leader in shared.items()}
                result = _run_pass(job, ranks, probe, shared, None)
                result.notes = [*notes, *result.notes]
            kept = _without_gradient(job, ranks, result.taps)
    owners = {leader: plan.owners[probe.shared[leader]] % ranks.size for leader in shared.values()}
    counts = _count(job, plan, result)
    return Gathered(result=result, ranks=ranks, shared=shared, owners=owners, counts=counts, kept=kept)


def _groups_with_different_counts(ranks: Ranks, taps: Taps, shared: dict[str, str]) -> set[str]:
    """Return the leaders of groups in which a layer that got gradients counted other tokens than the leader."""
    names = list(shared)
    own = ranks.sum([float(taps.taps[name].sums.num_tokens) for name in names])
    led = ranks.sum([float(taps.taps[shared[name]].input_sum.num_tokens) for name in names])
    return {shared[name] for name, mine, leads in zip(names, own, led, strict=True) if mine and mine != leads}


def _run_pass(job: Job, ranks: Ranks, probe: Probe, shared: dict[str, str], store: PassStore | None) -> PassResult:
    mine = ranks.share(probe.splits.statistics)

    def make_taps() -> Taps:
        return Taps(
            {name: job.targets[name].base_layer for name in shared},
            widths={name: (job.targets[name].in_features, job.targets[name].out_features) for name in shared},
            shared_inputs=shared,
            devices={name: job.targets[name].device for name in shared},
            dtype=getattr(torch, job.config.accumulate_dtype),
        )

    seed_generators(job.seed)  # a collator that draws gives the same batches again, whatever was run before
    kept = job.collate.generators_kept()
    with job.bar(len(mine), "LoRA-DA statistics") as bar, ranks.together("statistics pass"), kept:
        return collect(
            job.model,
            mine,
            collate=job.collate,
            compute_loss=job.compute_loss,
            settings=probe.settings,
            make_taps=make_taps,
            on_samples=bar.update,
            store=store,
            lockstep=job.lockstep(probe.splits.statistics, "statistics pass"),
        )


def _count(job: Job, plan: Plan, result: PassResult | None) -> PassCounts:
    mine = None
    if result is not None:
        mine = (result.num_samples, result.num_items, result.num_unlabelled, result.batch_size, result.notes)
    passes = [counted for counted in job.ranks.gather(mine) if counted is not None]
    counted = passes if plan.schedule == "samples" else passes[:1]  # the others saw the same samples
    return PassCounts(
        num_samples=sum(samples for samples, _, _, _, _ in counted),
        num_items=sum(items for _, items, _, _, _ in counted),
        num_unlabelled=sum(unlabelled for _, _, unlabelled, _, _ in counted),
        batch_size=min(size for _, _, _, size, _ in passes),
        notes=sorted({note for _, _, _, _, notes in passes for note in notes}),
    )


UNCALLED = "no sample goes through it"
UNROUTED = "no token is routed to it"
NO_GRADIENT = "the loss does not depend on it"
UNCOUNTED = "no token that counts goes through it"


def _without_gradient(job: Job, ranks: Ranks, taps: Taps) -> dict[str, str]:
    """Find the layers that no sample went through, or that the loss does not depend on."""
    names = list(taps.taps)
    calls = ranks.sum([float(taps.taps[name].forward_calls) for name in names])
    returns = ranks.sum([float(taps.taps[name].backward_calls) for name in names])
    reasons: dict[str, str] = {}
    for name, called, returned in zip(names, calls, returns, strict=True):
        if not called:
            reasons[name] = UNROUTED if job.targets[name].is_routed else UNCALLED
        elif not returned:
            reasons[name] = NO_GRADIENT
    if job.config.uncalled_layers == "error":
        refuse_uncalled([name for name, reason in reasons.items() if reason == UNCALLED], len(names))
    return reasons


def refuse_uncalled(uncalled: list[str], count: int) -> None:
    """Raise an error for layers whose taps were never called.

    Raises:
        TapNotCalledError: if there are any.
    """
    if uncalled:
        raise TapNotCalledError(
            f"The taps of {len(uncalled)} of {count} layers were never called ({uncalled[0]} first). Either no "
            "sample goes through them: exclude them from target_modules, or set uncalled_layers='keep' to leave them "
            "to PEFT. Or their code is compiled or fused and goes around the module: initialise before "
            "torch.compile, and without fused kernels for these layers."
        )


def check_any_gradient(reasons: Mapping[str, str], count: int) -> None:
    """Verify that a gradient came back to some layer, once all windows are done.

    Args:
        reasons: Why layers are kept.
        count: How many layers there are.

    Raises:
        TapNotCalledError: if no layer was called, or no gradient came back to any.
    """
    uncalled = [name for name, reason in reasons.items() if reason == UNCALLED]
    if len(uncalled) == count:
        refuse_uncalled(uncalled, count)
    if sum(reason in (UNCALLED, UNROUTED, NO_GRADIENT) for reason in reasons.values()) == count:
        raise TapNotCalledError(
            "No gradient came back to any tapped layer: the loss is cut off from the model (a detach, no_grad, or "
            "gradient checkpointing that starts from inputs without gradients). Check compute_loss."
        )
