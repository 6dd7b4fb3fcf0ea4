"""The stage that reads the data: the probe and the statistics pass."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import Any

import torch

from lora_da_hf.adapters.backward import checked_backward
from lora_da_hf.errors import DataError, TapNotCalledError
from lora_da_hf.losses import is_encoder_decoder, max_sample_length, shifts_labels
from lora_da_hf.pipeline.job import Job
from lora_da_hf.samples import SampleSplits
from lora_da_hf.statistics.collect import PassResult, PassSettings, check_lengths, collect
from lora_da_hf.statistics.losses import find_reduction
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.taps import Taps, find_shared_inputs
from lora_da_hf.statistics.token_masks import is_packed, read_batch_tokens

_PROBED_SAMPLES = 8


def probe(job: Job, splits: SampleSplits) -> tuple[SampleSplits, PassSettings, dict[str, str]]:
    """Learn from a few samples how the loss is made and which layers share an input.

    Returns:
        The samples, with labelled ones alone for the search and the final check; the settings of the pass; and the
        leader of each layer in the order that they are called.
    """
    shifts = shifts_labels(job.model)
    with job.stage("probe"), job.ranks.together("probe"), without_checkpointing(job.model):
        check_lengths([*splits.statistics, *splits.search, *splits.unseen], max_sample_length(job.model))
        labelled = _labelled(job, splits.statistics, shifts, count=_PROBED_SAMPLES)
        if not labelled:
            raise DataError(
                f"None of the {len(splits.statistics)} samples has a label that counts (all are -100). Check how "
                "labels are masked, and that samples are not truncated before their completion begins."
            )
        splits = _with_labels(job, splits, shifts)
        first = job.collate(labelled[:1])
        layers = {name: target.base_layer for name, target in job.targets.items()}

        def run_forward() -> None:
            with torch.no_grad():
                job.compute_loss(job.model, first, None)

        with checked_backward(job.scan.targets):
            shared = find_shared_inputs(layers, run_forward)
        reduction = find_reduction(
            job.compute_loss,
            job.model,
            job.collate,
            labelled,
            shifts_labels=shifts,
            declared=job.config.loss_reduction,
        )
    settings = PassSettings(
        batch_size=min(job.batch_size, max(1, len(splits.statistics))),
        token_mask=job.config.token_mask,
        shifts_labels=shifts,
        encoder_decoder=is_encoder_decoder(job.model),
        reduction=reduction,
    )
    job.report.loss_reduction = f"{reduction.kind} ({reduction.reason})"
    job.report.population_size = splits.population_size
    job.report.notes += splits.notes
    if is_packed(first):
        job.report.notes.append(
            "a sample of the data set is a packed row of several sequences: it counts as one, with the mean of all its "
            "labels"
        )
    return splits, settings, shared


def _with_labels(job: Job, splits: SampleSplits, shifts: bool) -> SampleSplits:
    """Leave samples without a label out of the search and the final check; a search that loses all gets another one."""
    unseen = _labelled(job, splits.unseen, shifts)
    search = _labelled(job, splits.search, shifts)
    statistics = splits.statistics
    if splits.search and not search and unseen:
        search, unseen = unseen[:1], unseen[1:]
    elif splits.search and not search:
        spare = next((k for k in reversed(range(len(statistics))) if _labelled(job, [statistics[k]], shifts)), 0)
        if len(_labelled(job, statistics, shifts, count=2)) < 2:
            raise DataError(
                "One sample alone has a label, and the line search needs one that the statistics did not see. Give "
                "more labelled samples, or a step_size."
            )
        search = [statistics[spare]]
        statistics = [*statistics[:spare], *statistics[spare + 1 :]]
    return dataclasses.replace(splits, statistics=statistics, search=search, unseen=unseen)


def _labelled(job: Job, samples: list[Any], shifts: bool, count: int | None = None) -> list[Any]:
    """Return the first ``count`` samples that have a label, or all of them."""
    has_label = (s for s in samples if read_batch_tokens(job.collate([s]), shifts_labels=shifts).num_labelled)
    return list(itertools.islice(has_label, count))


def gather_statistics(
    job: Job, splits: SampleSplits, settings: PassSettings, shared: dict[str, str]
) -> tuple[PassResult, dict[str, str]]:
    """Run the pass over this process's share of the samples, and count what all of them saw.

    The input of a group of layers is summed in the backward pass of its leader. Should a gradient reach a layer and not
    its leader, the pass is repeated with those layers apart.

    Returns:
        The sums, and the leader of each layer that they were taken with.
    """
    with job.stage("statistics"):
        result = _run_pass(job, splits, settings, shared)
        apart = _groups_with_different_counts(job, result.taps, shared)
        if apart:
            job.report.notes.append(
                f"{len(apart)} layers that share an input got gradients on their own: collected again"
            )
            shared = {name: name if leader in apart else leader for name, leader in shared.items()}
            result = _run_pass(job, splits, settings, shared)
        _count(job, result)
        _check_called(job, result.taps)
    return result, shared


def _groups_with_different_counts(job: Job, taps: Taps, shared: dict[str, str]) -> set[str]:
    """Return the leaders of groups in which a layer that got gradients counted other tokens than the leader."""
    names = list(shared)
    own = job.ranks.sum([float(taps.taps[name].sums.num_tokens) for name in names])
    led = job.ranks.sum([float(taps.taps[shared[name]].input_sum.num_tokens) for name in names])
    return {shared[name] for name, mine, leads in zip(names, own, led, strict=True) if mine and mine != leads}


def _run_pass(job: Job, splits: SampleSplits, settings: PassSettings, shared: dict[str, str]) -> PassResult:
    mine = job.ranks.share(splits.statistics)

    def make_taps() -> Taps:
        return Taps(
            {name: job.targets[name].base_layer for name in shared},
            widths={name: (job.targets[name].in_features, job.targets[name].out_features) for name in shared},
            shared_inputs=shared,
            devices={name: job.targets[name].device for name in shared},
            dtype=getattr(torch, job.config.accumulate_dtype),
        )

    with job.bar(len(mine), "LoRA-DA statistics") as bar, job.ranks.together("statistics pass"):
        return collect(
            job.model,
            mine,
            collate=job.collate,
            compute_loss=job.compute_loss,
            settings=settings,
            make_taps=make_taps,
            on_samples=bar.update,
            lockstep=job.lockstep(splits.statistics, "statistics pass"),
        )


def _count(job: Job, result: PassResult) -> None:
    labelled, unlabelled = job.ranks.sum([result.num_samples, result.num_unlabelled])
    job.report.num_samples, job.report.num_unlabelled = int(labelled), int(unlabelled)
    gathered = job.ranks.gather((result.batch_size, result.notes, result.sample_digests))
    job.report.batch_size = min(size for size, _, _ in gathered)
    job.report.notes += sorted({note for _, notes, _ in gathered for note in notes})
    if unlabelled:
        job.report.notes.append(f"{int(unlabelled)} samples have no label and were left out")
    digests = [digests for _, _, digests in gathered]
    ordered = [d[i] for i in range(max(map(len, digests))) for d in digests if i < len(d)]
    job.report.data_fingerprint = hashlib.sha256("".join(ordered).encode()).hexdigest()


def _check_called(job: Job, taps: Taps) -> None:
    """Find the layers that no sample went through, or that the loss does not depend on."""
    names = list(taps.taps)
    calls = job.ranks.sum([float(taps.taps[name].forward_calls) for name in names])
    returns = job.ranks.sum([float(taps.taps[name].backward_calls) for name in names])
    uncalled = [n for n, number in zip(names, calls, strict=True) if not number and not job.targets[n].is_routed]
    if uncalled and (job.config.uncalled_layers == "error" or len(uncalled) == len(names)):
        raise TapNotCalledError(
            f"The taps of {len(uncalled)} of {len(names)} layers were never called ({uncalled[0]} first). Either no "
            "sample goes through them: exclude them from target_modules, or set uncalled_layers='keep' to leave them "
            "to PEFT. Or their code is compiled or fused and goes around the module: initialise before "
            "torch.compile, and without fused kernels for these layers."
        )
    if not any(returns):
        raise TapNotCalledError(
            "No gradient came back to any tapped layer: the loss is cut off from the model (a detach, no_grad, or "
            "gradient checkpointing that starts from inputs without gradients). Check compute_loss."
        )
    for name, called, returned in zip(names, calls, returns, strict=True):
        if not called:
            routed = job.targets[name].is_routed
            job.report.kept[name] = "no token is routed to it" if routed else "no sample goes through it"
        elif not returned:
            job.report.kept[name] = "the loss does not depend on it"
