"""`apply_init`: an adapter from a stored initialisation, without a pass over data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.artifacts.store import StoredInit, check_base_model, load_init
from lora_da_hf.collator import RawCollate
from lora_da_hf.distributed.parameters import refuse_split_models
from lora_da_hf.errors import ArtifactError, ConfigError, TargetError
from lora_da_hf.losses import unwrapped
from lora_da_hf.pipeline.agreement import check_same_settings, choose_together, fingerprint
from lora_da_hf.pipeline.base_model import base_model_facts, trained_heads
from lora_da_hf.pipeline.heads import take_over_saved_modules
from lora_da_hf.pipeline.job import Job, make_job
from lora_da_hf.pipeline.probe import Probe, run_probe
from lora_da_hf.pipeline.run import hand_over, make_report
from lora_da_hf.pipeline.solve import Solved
from lora_da_hf.pipeline.step import Step, find_step, given_step, write_adapter
from lora_da_hf.pipeline.stored import Given, config_for_use, gives_step, stored_step
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.samples import SampleSplits, is_loader, samples_of_loader
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.theory.steps import rounding_notes

_OF_THE_STATISTICS = ("num_samples", "num_unlabelled", "population_size", "batch_size", "data_fingerprint")
"""What the report takes over from the stored one."""
_OTHER_DATA = "the statistics may have seen samples of this loss: the data is another, or in another order"


def apply_init(
    model: nn.Module,
    init: str | Path | StoredInit,
    *,
    config: Given = None,
    step_size: float | Literal["line_search"] | None = None,
    samples: Any = None,
    compute_loss: ComputeLoss | None = None,
    data_collator: RawCollate | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> LoRADAReport:
    """Initialise a LoRA adapter from a stored initialisation, in place and without statistics.

    Each layer gets the first columns of its stored basis at the rank and the scaling that PEFT gives it, so that
    ``scaling * B A`` is the step along it. A head that is trained beside the adapter gets its stored weights. With
    several processes, call this on each of them with the same folder.

    Args:
        model: A PEFT model with a fresh LoRA adapter that is active.
        init: A folder, or what `load_init` or `pull_init` returned.
        config: Settings of the step, the split and the search, by name or as a config; of a config, what is not at its
            default replaces what is stored.
        step_size: How far step 0 goes, whatever the config says; "line_search": what ``samples`` choose; None: the
            config's if it gives one, else as stored for these ranks.
        samples: Samples to measure the loss on before and after. Those that the statistics would take are left out.
        compute_loss, data_collator, batch_size, device, progress: As for `initialize_lora_da`.

    Returns:
        What was done, with ``init_from`` and ``artifact`` saying where it came from.

    Raises:
        ArtifactError: if the initialisation is damaged, or differs between processes.
        BaseModelMismatchError: if it was computed for another base.
        TargetError: if a layer of the adapter has no stored basis, or one of a smaller rank.
        AdapterAlreadyTrainedError: if the adapter is not a fresh one.
        ConfigError: if ``config`` asks for what only statistics can give, or a step is to be searched without samples.
        LoRADAError: else as `initialize_lora_da` has them.

    If this raises, the model and its adapter stay as they were, except what several processes hold in parts.
    """
    model = unwrapped(model)
    refuse_split_models(model)
    facts = base_model_facts(model)  # by all processes together, before one of them may fail
    stored = init if isinstance(init, StoredInit) else load_init(init, statistics=False)
    stored = dataclasses.replace(stored, notes=check_base_model(stored, facts))
    if is_loader(samples):
        samples, loader_collator = samples_of_loader(samples)
        data_collator = data_collator or loader_collator
    if step_size == "line_search" and samples is None:
        raise ConfigError('step_size="line_search" needs samples to search on. Give some, or leave it out.')
    is_given = step_size is not None or gives_step(config)
    settings = config_for_use(stored.manifest, config)
    settings = settings if step_size is None else dataclasses.replace(settings, step_size=step_size)
    options: dict[str, Any] = {"seed": stored.report.seed, "device": device, "progress": progress}
    job = make_job(model, settings, compute_loss, data_collator, batch_size, **options)
    if len(set(job.processes.gather(stored.manifest.digest))) > 1:
        raise ArtifactError(f"{stored.folder} is not the same initialisation on all processes. Give all the same one.")
    check_same_settings(job)
    solved = _match(job, stored)
    with job.restored_on_failure(trained_heads(model, job.scan.adapter_name)), job.collate.generators_kept():
        step, layers, probe, notes = _write(job, stored, solved, samples, is_given=is_given)
    report = make_report(
        job,
        solved,
        step,
        layers,
        **{name: getattr(stored.report, name) for name in _OF_THE_STATISTICS},
        loss_reduction=stored.report.loss_reduction if probe is None else probe.reduction,
        step_size_by_rank=step.step_size_by_rank if step.search else stored.report.step_size_by_rank,
        notes=[*notes, *step.notes],
        artifact=str(stored.folder),
        init_from=stored.source,
    )
    hand_over(job, report)
    return report


def _write(
    job: Job, stored: StoredInit, solved: Solved, samples: Any, *, is_given: bool
) -> tuple[Step, list[LayerReport], Probe | None, list[str]]:
    """Write heads and adapter, at the given, searched or stored step."""
    notes, probe, report = [*stored.notes, *solved.notes], None, stored.report
    with job.stage("write"):
        notes += take_over_saved_modules(job.model, job.scan.adapter_name, stored)
    with job.prepared():
        searches = is_given and job.config.searches_step
        if samples is not None:
            splits, digests, of_samples = choose_together(job, samples, report.population_size)
            if fingerprint(splits, digests) != report.data_fingerprint and (splits.search or splits.unseen):
                notes.append(_OTHER_DATA)
            if not searches:  # no sample is taken for a search
                splits = dataclasses.replace(splits, search=[], unseen=splits.unseen or splits.search)
            probe = _probe(job, splits)
            notes += (*of_samples, *probe.notes)
        elif report.unseen_loss_after is not None:
            notes.append(
                f"its author's held-out loss went from {report.unseen_loss_before:.4f} to "
                f"{report.unseen_loss_after:.4f} ({report.num_unseen_samples} samples); no loss was measured here"
            )
            job.say(f"LoRA-DA: {notes[-1]}")
        if searches and probe is not None:
            step = find_step(job, solved, probe, for_other_ranks=False)
        elif is_given or job.config.start == "inputs":
            step = given_step(job)
        else:
            size, source = stored_step(stored.manifest, {name: job.targets[name].rank for name in solved.solutions})
            step = Step(step_size=size, notes=(source,))
        step, layers = write_adapter(job, solved, step, probe)
    return step, layers, probe, notes


def _match(job: Job, stored: StoredInit) -> Solved:
    """Find the stored solution of each layer, and list the layers without one."""
    missing = [name for name in job.targets if name not in stored.bases and name not in stored.report.kept]
    found = {name: target for name, target in job.targets.items() if name in stored.bases}
    if missing or not found:
        raise TargetError(
            f"The stored initialisation has nothing for {len(missing)} of {len(job.targets)} layers "
            f"({next(iter(missing), 'all were kept')} first). Leave them out of target_modules, or compute an "
            "initialisation for them."
        )
    layers: dict[str, LayerReport] = {}
    for name, target in found.items():
        layer = stored.manifest.layers[name]
        if target.rank > layer.max_rank:
            raise TargetError(
                f"{name} has rank {target.rank}, and rank {layer.max_rank} is stored. Lower the adapter's rank; or, if "
                "the full statistics are stored, use refit_init with a larger max_rank."
            )
        layers[name] = dataclasses.replace(layer, rank=target.rank, peft_scaling=target.peft_scaling)
    why = {name: stored.report.kept[name] for name in job.targets if name not in found}
    kept = {name: f"the stored initialisation has none for it: {reason}" for name, reason in why.items()}
    notes = rounding_notes(stored.report.layers, layer_steps=stored.manifest.config.lengths)
    unused = [name for name in stored.bases if name not in found]
    if unused:
        notes.append(f"{len(unused)} stored layers have no adapter here ({unused[0]} first)")
    return Solved(
        solutions={name: stored.bases[name] for name in found},
        layers=layers,
        kept={**job.scan.kept, **kept},
        step_unit=stored.report.step_unit,
        notes=tuple(notes),
    )


def _probe(job: Job, splits: SampleSplits) -> Probe:
    """Probe the samples that the statistics did not take."""
    notes: tuple[str, ...] = ()  # those of the samples speak of statistics, which are not taken
    if not splits.search and not splits.unseen:
        notes = (f"no loss was measured: the statistics may have seen all of the {len(splits.statistics)} samples",)
    with adapters_off(job.scan.targets), job.stage("probe"):
        return run_probe(job, dataclasses.replace(splits, notes=notes))
