"""`apply_init`: an adapter from a stored initialisation, without a pass over data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_da_hf.adapters.afterwards import freeze_a, mark_initialized
from lora_da_hf.adapters.targets import Target, check_fresh, find_targets, keep_weights_unpacked
from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.artifacts.basis import StoredBasis, stored_solution
from lora_da_hf.artifacts.manifest import BaseModelFacts, Manifest
from lora_da_hf.artifacts.store import StoredInit, check_base_model, load_init
from lora_da_hf.collator import DeviceCollator, RawCollate
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.parameters import is_partitioned, outputs_not_rounded, refuse_split_models, settle
from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import ArtifactError, TargetError
from lora_da_hf.losses import checked_loss, input_device, model_loss, unwrapped
from lora_da_hf.pipeline.agreement import check_same_settings, digest_splits
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.pipeline.beside import take_over_saved_modules
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import probe
from lora_da_hf.pipeline.run import DEFAULT_BATCH_SIZE, choose_together, first_given
from lora_da_hf.pipeline.step import find_step, write_adapter, write_solutions
from lora_da_hf.pipeline.stored import (
    config_for_use,
    gives_step,
    stored_step,
)
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.samples import is_loader, pad_samples, samples_of_loader
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.model_state import prepared_for_pass
from lora_da_hf.theory.layer_scales import rounding_notes


def apply_init(
    model: nn.Module,
    init: str | Path | StoredInit,
    *,
    adapter_name: str | None = None,
    config: LoRADAConfig | Mapping[str, Any] | None = None,
    step_size: float | None = None,
    samples: Any = None,
    compute_loss: ComputeLoss | None = None,
    data_collator: RawCollate | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> LoRADAReport:
    """Initialise a LoRA adapter from a stored initialisation, in place and without statistics.

    Each layer gets the first columns of its stored basis at the rank and the scaling that PEFT gives it, so that
    ``scaling * B A = step_size * D^ Q Q^T``. Modules that are trained beside the adapter, such as a classification
    head, get their stored weights. In a run of several processes each must call this, with the same folder.

    Which step: the one given; or, where samples are given, the one that a new line search finds on them; or the
    stored one, for these ranks (`lora_da_hf.pipeline.stored.stored_step`). A new search draws its samples as the stored
    initialisation did, so that on the same data they are none that its statistics saw.

    Args:
        model: A PEFT model with a fresh LoRA adapter, not wrapped in DDP.
        init: A folder, or what `load_init` or `pull_init` returned.
        adapter_name: The adapter, which must be the active one (another is an error); None: that one.
        config: Settings of the step, the split and the search, by name or as a config; of a config, what is not at its
            default replaces what is stored.
        step_size: How far step 0 goes, whatever the config says.
        samples: Samples to search the step on, or, with a step, to measure the loss on; None: neither. As many of them
            as the statistics would take of these are left out, since they may be the ones that were taken.
        compute_loss: As for `initialize_lora_da`.
        data_collator: As for `initialize_lora_da`.
        batch_size: Used if the config gives none.
        device: Where batches go; None: where the embeddings are.
        progress: Whether to show progress bars.

    Returns:
        What was done, with ``init_from`` and ``artifact`` saying where it came from.

    Raises:
        ArtifactError: if the initialisation is damaged, or differs between processes.
        BaseModelMismatchError: if it was computed for another base.
        TargetError: if a layer of the adapter has no stored basis, or one of a smaller rank.
        AdapterAlreadyTrainedError: if the adapter is not a fresh one.
        ConfigError: if ``config`` asks for what only statistics can give.
        UnsupportedSetupError: under FSDP1, tensor or pipeline parallelism.
        DataError, StatisticsError, OutOfStepError, WriteError, PeerFailed: as `initialize_lora_da` has them.

    Whatever is raised but an `OutOfStepError`, the model and its adapter are as they were.
    """
    start = time.perf_counter()
    model = unwrapped(model)
    ranks = Ranks.current()
    refuse_split_models(model)
    with ranks.together("search for LoRA layers"):
        scan = find_targets(model, adapter_name)
    check_fresh(scan.targets)
    with ranks.stage("fingerprint", has_collectives=is_partitioned(model)):
        facts = base_model_facts(model)
    with ranks.together("reading of the initialisation"):
        stored = _open(init, facts)
        given_step = step_size is not None or gives_step(config)
        config = config_for_use(stored.manifest, config)
        if step_size is not None or (samples is not None and not given_step):
            config = dataclasses.replace(config, step_size="line_search" if step_size is None else step_size)
    if len(set(ranks.gather(stored.manifest.digest))) > 1:
        raise ArtifactError(f"{stored.folder} is not the same initialisation on all processes. Give all the same one.")
    if is_loader(samples):
        samples, loader_collator = samples_of_loader(samples)
        data_collator = data_collator or loader_collator
    job = Job(
        model=model,
        config=config,
        ranks=ranks,
        scan=scan,
        compute_loss=model_loss if compute_loss is None else checked_loss(compute_loss),
        collate=DeviceCollator(data_collator or pad_samples, device or input_device(model)),
        seed=first_given(config.seed, stored.report.seed),
        batch_size=first_given(config.batch_size, batch_size, DEFAULT_BATCH_SIZE),
        progress=progress,
        output_dir=None,
    )
    check_same_settings(job, None)
    job.report = _new_report(job, stored)
    with ranks.together("matching of the layers"):
        solutions = _match(job, stored)
    job.report.seconds["read"] = time.perf_counter() - start
    with job.restored_on_failure(), job.collate.generators_kept():
        take_over_saved_modules(job, stored)
        if samples is None:
            _write_without_data(job, stored.manifest, solutions, given_step=given_step)
        else:
            _write_with_data(job, stored.manifest, solutions, samples)
    settle(model)
    mark_initialized(model, scan.adapter_name, may_be_zero=job.report.step_size == 0)
    if config.freeze_a:
        freeze_a(model, scan.adapter_name)
    return job.report


def _open(init: str | Path | StoredInit, facts: BaseModelFacts) -> StoredInit:
    """Read and check an initialisation but for its statistics, which are not used."""
    if isinstance(init, StoredInit):
        return dataclasses.replace(init, notes=check_base_model(init.manifest, facts))
    return load_init(init, base_model=facts, statistics=False)


def _new_report(job: Job, stored: StoredInit) -> LoRADAReport:
    """Start a report that says what the stored statistics were taken from."""
    layer_steps = stored.manifest.config.layer_steps
    return LoRADAReport(
        kept=dict(job.scan.kept),
        adapter_name=job.scan.adapter_name,
        seed=job.seed,
        num_samples=stored.report.num_samples,
        num_unlabelled=stored.report.num_unlabelled,
        population_size=stored.report.population_size,
        batch_size=stored.report.batch_size,
        loss_reduction=stored.report.loss_reduction,
        data_fingerprint=stored.report.data_fingerprint,
        step_size_by_rank=dict(stored.report.step_size_by_rank),
        step_unit=stored.report.step_unit,
        config=job.config.to_dict(),
        notes=[*stored.notes, *rounding_notes(stored.report.layers, layer_steps=layer_steps)],
        artifact=str(stored.folder),
        init_from=stored.source,
    )


def _match(job: Job, stored: StoredInit) -> dict[str, LayerSolution]:
    """Find the stored solution of each layer, and list what has none.

    Raises:
        TargetError: if a layer has none that fits, or none has one.
    """
    reports = {layer.name: layer for layer in stored.report.layers}
    solutions: dict[str, LayerSolution] = {}
    missing: list[str] = []
    for name, target in job.targets.items():
        if name in stored.bases:
            _check_fits(target, stored.bases[name])
            solutions[name] = _solution(stored.bases[name], reports[name], target.device)
            job.report.layers.append(_layer_report(target, reports[name]))
        elif name in stored.report.kept:
            job.report.kept[name] = f"the stored initialisation has none for it: {stored.report.kept[name]}"
        else:
            missing.append(name)
    if missing or not solutions:
        raise TargetError(
            f"The stored initialisation has nothing for {len(missing)} of {len(job.targets)} layers "
            f"({next(iter(missing), 'all were kept')} first). Leave them out of target_modules, or compute an "
            "initialisation for them."
        )
    unused = [name for name in stored.bases if name not in job.targets]
    if unused:
        job.report.notes.append(f"{len(unused)} stored layers have no adapter here ({unused[0]} first)")
    return solutions


def _check_fits(target: Target, basis: StoredBasis) -> None:
    widths = (basis.basis_A.shape[1], basis.basis_B.shape[0])
    if widths != (target.in_features, target.out_features):
        raise TargetError(
            f"{target.name} maps {target.in_features} to {target.out_features} features, and the stored layer of "
            f"that name {widths[0]} to {widths[1]}. It was computed for another model."
        )
    if target.rank > basis.basis_A.shape[0]:
        raise TargetError(
            f"{target.name} has rank {target.rank}, and rank {basis.basis_A.shape[0]} is stored. Lower the adapter's "
            "rank; or, if the full statistics are stored, use refit_init with a larger max_rank."
        )


def _solution(basis: StoredBasis, report: LayerReport, device: torch.device) -> LayerSolution:
    basis_A, basis_B = (tensor.to(device).double() for tensor in (basis.basis_A, basis.basis_B))
    return stored_solution(StoredBasis(basis_A=basis_A, basis_B=basis_B), report)


def _layer_report(target: Target, stored: LayerReport) -> LayerReport:
    return dataclasses.replace(
        stored,
        rank=target.rank,
        peft_scaling=target.peft_scaling,
        notes=list(stored.notes),
    )


def _write_without_data(job: Job, manifest: Manifest, solutions: dict[str, LayerSolution], *, given_step: bool) -> None:
    """Write at the step that was given, or at the stored one."""
    if given_step:
        step = None if job.config.step_size is None else float(job.config.step_size)
    else:
        step, source = stored_step(manifest, {name: job.targets[name].rank for name in solutions})
        job.report.notes.append(source)
    job.report.step_size = step
    write_solutions(job, solutions, step)


def _write_with_data(job: Job, manifest: Manifest, solutions: dict[str, LayerSolution], samples: Any) -> None:
    """Search the step on samples, or measure the loss on them, and write."""
    splits = choose_together(job, samples, manifest.report.population_size)
    digest_splits(job, splits)
    splits = dataclasses.replace(splits, notes=())  # they would speak of statistics, which are not taken
    if not splits.search and not splits.unseen:
        job.report.notes.append(
            f"no loss was measured: the statistics may have seen all of the {len(splits.indices)} samples"
        )
    with prepared_for_pass(job.model, seed=job.seed), outputs_not_rounded(job.model):
        keep_weights_unpacked(job.model)
        with adapters_off(job.scan.targets):
            found = probe(job, splits, takes_statistics=False)
            step = find_step(job, found.splits, found.settings, solutions)
        write_adapter(job, found.splits, found.settings, solutions, step)
