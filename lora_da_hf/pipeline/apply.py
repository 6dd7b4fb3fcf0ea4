"""`apply_init`: an adapter from a stored initialisation, without a pass over data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_da_hf.adapters.targets import Target
from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.artifacts.store import StoredInit, check_base_model, load_init
from lora_da_hf.collator import RawCollate
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.parameters import refuse_split_models
from lora_da_hf.errors import ArtifactError, TargetError
from lora_da_hf.losses import unwrapped
from lora_da_hf.pipeline.agreement import check_same_settings, choose_together
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.pipeline.job import Job, make_job
from lora_da_hf.pipeline.probe import Probe, probe
from lora_da_hf.pipeline.run import hand_over, make_report
from lora_da_hf.pipeline.saved_modules import take_over_saved_modules, trained_heads
from lora_da_hf.pipeline.solve import Solved
from lora_da_hf.pipeline.step import Step, find_step, write_adapter
from lora_da_hf.pipeline.stored import Given, config_for_use, gives_step, stored_step
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.samples import SampleSplits, is_loader, samples_of_loader
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.theory.layer_scales import rounding_notes

_OF_THE_STATISTICS = (
    *("num_samples", "num_unlabelled", "population_size", "batch_size"),
    *("loss_reduction", "data_fingerprint"),
)
"""What the report takes over from the stored one."""


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
    head, get their stored weights. With several processes, call this on each of them with the same folder.

    The step is the given one; or, with samples, the one that a new line search finds on them; or the stored one for
    these ranks (`lora_da_hf.pipeline.stored.stored_step`). A new search draws its samples as the stored initialisation
    did, so that on the same data they are samples which the statistics did not see.

    Args:
        model: A PEFT model with a fresh LoRA adapter, not wrapped in DDP.
        init: A folder, or what `load_init` or `pull_init` returned.
        adapter_name: The adapter, which must be the active one (another is an error); None: that one.
        config: Settings of the step, the split and the search, by name or as a config; of a config, what is not at its
            default replaces what is stored.
        step_size: How far step 0 goes, whatever the config says.
        samples: Samples to search the step on or, with a given step, to measure the loss on; None: neither. Those that
            the statistics would take are left out.
        compute_loss, data_collator, batch_size, device, progress: As for `initialize_lora_da`.

    Returns:
        What was done, with ``init_from`` and ``artifact`` saying where it came from.

    Raises:
        ArtifactError: if the initialisation is damaged, or differs between processes.
        BaseModelMismatchError: if it was computed for another base.
        TargetError: if a layer of the adapter has no stored basis, or one of a smaller rank.
        AdapterAlreadyTrainedError: if the adapter is not a fresh one.
        ConfigError: if ``config`` asks for what only statistics can give, or processes differ in settings or
            samples.
        UnsupportedSetupError: under FSDP1, tensor or pipeline parallelism.
        DataError, StatisticsError, WriteError: as `initialize_lora_da` has them.

    If this raises, the model and its adapter stay as they were, except what several processes hold in parts.
    """
    model = unwrapped(model)
    refuse_split_models(model)
    stored = _open(init, model)
    if is_loader(samples):
        samples, loader_collator = samples_of_loader(samples)
        data_collator = data_collator or loader_collator
    job = make_job(
        model,
        _settings(stored, config, step_size, searches=samples is not None),
        adapter_name=adapter_name,
        compute_loss=compute_loss,
        data_collator=data_collator,
        batch_size=batch_size,
        seed=stored.report.seed,
        device=device,
        progress=progress,
    )
    if len(set(job.processes.gather(stored.manifest.digest))) > 1:
        raise ArtifactError(f"{stored.folder} is not the same initialisation on all processes. Give all the same one.")
    check_same_settings(job)
    with job.stage("read"):
        solved = _match(job, stored)
    given_step = step_size is not None or gives_step(config)
    with job.restored_on_failure(trained_heads(model, job.scan.adapter_name)), job.collate.generators_kept():
        with job.stage("write"):
            notes = take_over_saved_modules(model, job.scan.adapter_name, stored)
        with contextlib.ExitStack() as passes:
            found: Probe | None = None
            if samples is None:
                step = _step_without_data(job, stored, solved, given_step=given_step)
            else:
                splits, _, of_samples = choose_together(job, samples, stored.report.population_size)
                passes.enter_context(job.prepared())
                found = _probe(job, splits)
                step = find_step(job, solved, found, for_other_ranks=False)
                notes = (*notes, *of_samples, *found.notes)
            step, layers = write_adapter(job, solved, step, found)
    facts: dict[str, Any] = {name: getattr(stored.report, name) for name in _OF_THE_STATISTICS}
    if found is not None:
        facts["loss_reduction"] = found.reduction
    facts["step_size_by_rank"] = dict(step.step_size_by_rank if step.search else stored.report.step_size_by_rank)
    notes = (*stored.notes, *solved.notes, *notes, *step.notes)
    facts |= {"notes": list(notes), "artifact": str(stored.folder), "init_from": stored.source}
    report = make_report(job, solved, step, layers, **facts)
    hand_over(job, report)
    return report


def _open(init: str | Path | StoredInit, model: nn.Module) -> StoredInit:
    """Read and check an initialisation but for its statistics, which are not used."""
    facts = base_model_facts(model)
    if isinstance(init, StoredInit):
        return dataclasses.replace(init, notes=check_base_model(init.manifest, facts))
    return load_init(init, base_model=facts, statistics=False)


def _settings(stored: StoredInit, given: Given, step_size: float | None, *, searches: bool) -> LoRADAConfig:
    """Return the stored settings with those that are given in their place."""
    config = config_for_use(stored.manifest, given)
    if step_size is not None:
        return dataclasses.replace(config, step_size=step_size)
    return dataclasses.replace(config, step_size="line_search") if searches and not gives_step(given) else config


def _match(job: Job, stored: StoredInit) -> Solved:
    """Find the stored solution of each layer, and list the layers without one."""
    solutions: dict[str, LayerSolution] = {}
    layers: dict[str, LayerReport] = {}
    kept = dict(job.scan.kept)
    missing: list[str] = []
    for name, target in job.targets.items():
        if name in stored.bases:
            _check_fits(target, stored.bases[name])
            layer = stored.manifest.layers[name]
            solutions[name] = stored.bases[name]
            layers[name] = dataclasses.replace(
                layer, rank=target.rank, peft_scaling=target.peft_scaling, notes=list(layer.notes)
            )
        elif name in stored.report.kept:
            kept[name] = f"the stored initialisation has none for it: {stored.report.kept[name]}"
        else:
            missing.append(name)
    if missing or not solutions:
        raise TargetError(
            f"The stored initialisation has nothing for {len(missing)} of {len(job.targets)} layers "
            f"({next(iter(missing), 'all were kept')} first). Leave them out of target_modules, or compute an "
            "initialisation for them."
        )
    notes = rounding_notes(stored.report.layers, layer_steps=stored.manifest.config.layer_steps)
    unused = [name for name in stored.bases if name not in job.targets]
    if unused:
        notes.append(f"{len(unused)} stored layers have no adapter here ({unused[0]} first)")
    return Solved(solutions=solutions, layers=layers, kept=kept, step_unit=stored.report.step_unit, notes=tuple(notes))


def _check_fits(target: Target, basis: LayerSolution) -> None:
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


def _step_without_data(job: Job, stored: StoredInit, solved: Solved, *, given_step: bool) -> Step:
    """Return the step that was given, or the stored one."""
    if given_step:
        return Step(step_size=None if job.config.step_size is None else float(job.config.step_size))
    ranks = {name: job.targets[name].rank for name in solved.solutions}
    size, source = stored_step(stored.manifest, ranks)
    return Step(step_size=size, notes=(source,))


def _probe(job: Job, splits: SampleSplits) -> Probe:
    """Probe the samples that the statistics did not take."""
    notes: tuple[str, ...] = ()  # those of the samples speak of statistics, which are not taken
    if not splits.search and not splits.unseen:
        notes = (f"no loss was measured: the statistics may have seen all of the {len(splits.indices)} samples",)
    with adapters_off(job.scan.targets), job.stage("probe"):
        return probe(job, dataclasses.replace(splits, notes=notes))
