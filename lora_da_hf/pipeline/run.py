"""`initialize_lora_da`: the stages in their order."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.adapters.write import freeze_a, mark_initialized
from lora_da_hf.artifacts.folders import check_replaceable, check_writable
from lora_da_hf.artifacts.store import write_init
from lora_da_hf.collator import RawCollate
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.parameters import settle
from lora_da_hf.errors import ConfigError
from lora_da_hf.losses import unwrapped
from lora_da_hf.pipeline.agreement import check_same_settings, choose_together, fingerprint
from lora_da_hf.pipeline.base_model import trained_heads
from lora_da_hf.pipeline.finished import Identity, identify, take_over_finished
from lora_da_hf.pipeline.heads import fit_heads
from lora_da_hf.pipeline.job import Job, make_job
from lora_da_hf.pipeline.plan import plan_windows
from lora_da_hf.pipeline.probe import compare_batch_with_samples, run_probe
from lora_da_hf.pipeline.save import adapter_as_stored, refuse_unsaveable
from lora_da_hf.pipeline.solve import Solved, solve_windows
from lora_da_hf.pipeline.step import Step, find_step, write_adapter
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.samples import SampleSplits, is_loader, samples_of_loader
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.model_state import ROUTER_LOSS, configs_with

logger = logging.getLogger(__name__)


def initialize_lora_da(
    model: nn.Module,
    samples: Any,
    *,
    config: LoRADAConfig | None = None,
    population_size: int | None = None,
    compute_loss: ComputeLoss | None = None,
    data_collator: RawCollate | None = None,
    output_dir: str | Path | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> LoRADAReport:
    """Initialise a LoRA adapter from data, in place (arXiv 2510.24561).

    The base weights are not touched. Afterwards the adapter is an ordinary one, but not a no-op: its step lowers the
    loss. With several processes, call this on each of them with the same samples; they share the work.

    Args:
        model: A PEFT model with a fresh LoRA adapter that is active. A compiled model is run as it is written.
        samples: A list or data set of tokenised samples, a stream of them, or a data loader.
        config: The settings; None: ``LoRADAConfig()``.
        population_size: N, how many samples training draws from; None: the number of samples.
        compute_loss: Maps model, batch and number of items to a scalar loss, dividing the sum over labels by the
            number of items unless that is None; None: the loss that the model returns.
        data_collator: Makes a batch of a list of samples; None: the loader's, or padding on the right.
        output_dir: Folder for the initialisation; None: it is not stored. One that is there already is used if model,
            adapter, samples and settings are the same, and replaced otherwise. Anything else there is an error.
        batch_size: Used if the config gives none; None: 8.
        seed: Of every random choice; None: 42.
        device: Where batches go; None: where the embeddings are.
        progress: Whether to show progress bars.

    Returns:
        What was done, layer by layer.

    Raises:
        TargetError: if no layer can be initialised.
        AdapterAlreadyTrainedError: if the adapter is not a fresh one.
        ConfigError: if settings contradict each other, settings or samples differ between processes, gradients are off,
            or ``output_dir`` holds something else, or cannot be written.
        DataError: if the samples cannot be used.
        StatisticsError: if the pass fails.
        PlanError: if a layer's statistics do not fit in the memory that they may take.
        SolveError: if no layer can be solved.
        UnsupportedSetupError: under FSDP1, tensor or pipeline parallelism, or if the adapter cannot be stored.
        WriteError: if the adapter reads back differently from what was written.

    If this raises, the model and its adapter stay as they were, except what several processes hold in parts.
    """
    model, config = unwrapped(model), LoRADAConfig.of(config)
    folder = None if output_dir is None else Path(output_dir)
    if population_size is not None and population_size < 1:
        raise ConfigError(f"population_size={population_size!r} must be at least 1.")
    if not torch.is_grad_enabled():
        raise ConfigError("Gradients are off. Call this outside of torch.no_grad() and torch.inference_mode().")
    if is_loader(samples):
        samples, loader_collator = samples_of_loader(samples)
        data_collator = data_collator or loader_collator
    job = make_job(model, config, compute_loss, data_collator, batch_size, seed=seed, device=device, progress=progress)
    if folder is None and config.save_statistics:
        raise ConfigError("save_statistics needs an output_dir, in which the statistics are kept. Give one.")
    least = min(target.rank for target in job.scan.targets)
    if config.max_rank is not None and config.max_rank < least:
        raise ConfigError(
            f"max_rank={config.max_rank} is below the adapter's rank, {least}, which is solved in any case. Leave it "
            "out, or give more, to store directions for other ranks."
        )
    if folder is not None:
        refuse_unsaveable(model, job.scan.adapter_name)
        check_replaceable(folder)
    check_same_settings(job, population_size=population_size, output_dir=folder is not None)
    heads = trained_heads(model, job.scan.adapter_name) if config.fit_heads else {}
    splits, digests, notes = choose_together(job, samples, population_size, with_heads=bool(heads))
    with job.restored_on_failure(heads), job.collate.generators_kept():
        report = _run(job, splits, digests, folder, list(notes))
    if report.kept and job.processes.is_main:
        (name, why), *others = report.kept.items()
        more = f", and so do {len(others)} more" if others else ""
        logger.warning("LoRA-DA: %s keeps PEFT's own initialisation (%s)%s", name, why, more)
    hand_over(job, report)
    return report


def _run(
    job: Job, splits: SampleSplits, digests: dict[str, list[str]], folder: Path | None, notes: list[str]
) -> LoRADAReport:
    """Compute the initialisation, unless the folder has it, and write it to adapter and folder."""
    if configs_with(job.model, ROUTER_LOSS):
        notes += [
            "the routers' auxiliary loss is left out of statistics and search, unless the loss asks for it itself"
        ]
    with contextlib.ExitStack() as files:
        with job.prepared():
            with adapters_off(job.scan.targets), job.stage("probe"):
                probe = run_probe(job, splits)
                identity = identify(job, digests, probe)
            finished, broken = (None, ()) if folder is None else take_over_finished(job, folder, identity)
            if finished is not None:
                return finished
            notes += fit_heads(job, probe, digests["heads"])
            statistics = _make_statistics_folder(job, folder, files)
            with adapters_off(job.scan.targets):
                plan = plan_windows(job, probe)
                job.say(f"LoRA-DA plan: {plan.describe()}")
                with job.stage("statistics"):
                    probe = compare_batch_with_samples(job, probe)
                solved, counts = solve_windows(job, probe, plan, statistics=statistics)
            step = find_step(job, solved, probe, for_other_ranks=folder is not None)
            step, layers = write_adapter(job, solved, step, probe)
        report = make_report(
            job,
            solved,
            step,
            layers,
            num_samples=counts.num_samples,
            num_unlabelled=counts.num_unlabelled,
            population_size=probe.splits.population_size,
            batch_size=counts.batch_size,
            loss_reduction=probe.reduction,
            data_fingerprint=fingerprint(splits, digests),
            plan=plan.describe(),
            notes=[*notes, *broken, *probe.notes, *counts.notes, *solved.notes, *step.notes],
        )
        return report if folder is None else _save(job, folder, solved, statistics, identity, report)


def make_report(job: Job, solved: Solved, step: Step, layers: list[LayerReport], **others: Any) -> LoRADAReport:
    """Put together what was done."""
    return LoRADAReport(
        **{**vars(step), **others},
        layers=layers,
        kept=solved.kept,
        adapter_name=job.scan.adapter_name,
        seed=job.seed,
        step_unit=solved.step_unit,
        seconds=job.seconds,
        config=job.config.to_dict(),
    )


def hand_over(job: Job, report: LoRADAReport) -> None:
    """Leave the adapter as training wants it."""
    settle(job.model)
    mark_initialized(job.model, job.scan.adapter_name, may_be_zero=report.step_size == 0)
    if job.config.freeze_a:
        freeze_a(job.model)


def _make_statistics_folder(job: Job, folder: Path | None, files: contextlib.ExitStack) -> Path | None:
    """Return where the first process puts statistics until all is written, beside the folder; None: nowhere."""
    if folder is None or not job.processes.is_main:
        return None
    check_writable(folder)
    if not job.config.save_statistics:
        return None
    target = folder.resolve()
    beside = tempfile.TemporaryDirectory(prefix=f"_{target.name}.", dir=target.parent)
    return Path(files.enter_context(beside))


def _save(
    job: Job, folder: Path, solved: Solved, statistics: Path | None, identity: Identity, report: LoRADAReport
) -> LoRADAReport:
    """Write the initialisation to its folder."""
    settle(job.model)  # FSDP2 leaves the root's parameters together after a pass, frozen as they were in it
    with job.stage("save"):
        adapter = adapter_as_stored(job.model, job.scan.adapter_name, job.base_model)
        report = dataclasses.replace(report, artifact=str(folder))
        if not job.processes.is_main:
            return report
        write_init(
            folder,
            bases=solved.solutions,
            report=report,
            base_model=job.base_model,
            adapter=adapter,
            statistics=sorted(statistics.iterdir()) if statistics else (),
            identity=identity,
        )
    return report
