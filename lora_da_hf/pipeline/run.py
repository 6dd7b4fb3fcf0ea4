"""`initialize_lora_da`: the stages in their order."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_da_hf.adapters.afterwards import freeze_a, mark_initialized
from lora_da_hf.adapters.resizing import check_resizable
from lora_da_hf.adapters.targets import check_fresh, find_targets, keep_weights_unpacked
from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.artifacts.folders import check_replaceable, check_writable
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.collator import DeviceCollator, RawCollate
from lora_da_hf.config import LoRADAConfig, checked_config
from lora_da_hf.distributed.parameters import outputs_not_rounded, refuse_split_models, settle
from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.losses import checked_loss, input_device, model_loss, unwrapped
from lora_da_hf.pipeline.agreement import Digests, check_same_settings, digest_splits
from lora_da_hf.pipeline.finished import take_over_finished
from lora_da_hf.pipeline.identity import identify
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.memory import linear_weights, plan_windows
from lora_da_hf.pipeline.probe import Probe, compare_batch_with_samples, probe
from lora_da_hf.pipeline.ranks_per_layer import spend_budget
from lora_da_hf.pipeline.resume import Progress
from lora_da_hf.pipeline.save import refuse_unsaveable, save_init, whole_adapter
from lora_da_hf.pipeline.step import find_step, write_adapter
from lora_da_hf.pipeline.windows import Solved, solve_windows
from lora_da_hf.report import LoRADAReport
from lora_da_hf.samples import (
    SampleSplits,
    choose_samples,
    has_positions,
    is_loader,
    pad_samples,
    samples_of_loader,
)
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.model_state import ROUTER_LOSS, configs_with, prepared_for_pass, random_state

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
DEFAULT_SEED = 42


def initialize_lora_da(
    model: nn.Module,
    samples: Any,
    *,
    config: LoRADAConfig | None = None,
    population_size: int | None = None,
    compute_loss: ComputeLoss | None = None,
    data_collator: RawCollate | None = None,
    adapter_name: str | None = None,
    output_dir: str | Path | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> LoRADAReport:
    """Initialise a LoRA adapter from data, in place (arXiv 2510.24561).

    The base weights are not touched. The adapter is an ordinary one afterwards, and not a no-op: its step was chosen to
    lower the loss. With a ``rank_budget`` its layers get new parameters, so no optimizer may have been made before.
    In a run of several processes each must call this with the same samples, and they share the work.

    Args:
        model: A PEFT model with a fresh LoRA adapter, not wrapped in DDP or a DeepSpeed engine; FSDP2 shards in place.
            Of what ``torch.compile`` returned, the model inside is run, as it is written.
        samples: A list or data set of tokenised samples, a stream of them, or a data loader.
        config: The settings; None: ``LoRADAConfig()``.
        population_size: N, how many samples training draws from. Used if the config gives none; None: the number of
            samples.
        compute_loss: Maps model, batch and number of items to a scalar loss, dividing the sum over labels by the
            number of items unless that is None; None: the loss that the model returns.
        data_collator: Makes a batch of a list of samples; None: the loader's, or padding on the right.
        adapter_name: The adapter, which must be the active one (another is an error); None: that one.
        output_dir: Where to write the initialisation, as a folder of its own; None: nowhere. If one is there that was
            made with the same model, adapter, samples and settings, it is used and nothing is computed; another one is
            replaced, and anything else is an error.
        batch_size: Used if the config gives none.
        seed: Used if the config gives none.
        device: Where batches go; None: where the embeddings are.
        progress: Whether to show progress bars.

    Returns:
        What was done, layer by layer.

    Raises:
        TargetError: if there is nothing that can be initialised.
        AdapterAlreadyTrainedError: if the adapter is not a fresh one.
        ConfigError: if settings contradict each other, settings or samples differ between processes, gradients are off,
            or ``output_dir`` holds something else, cannot be written, or is another process's at the moment.
        DataError: if the samples cannot be used.
        StatisticsError: if the pass fails, or a layer's tap was never called.
        PlanError: if a layer's statistics do not fit in the memory that they may take.
        SolveError: if a layer cannot be solved, or there is none to solve.
        UnsupportedSetupError: under FSDP1, tensor or pipeline parallelism; if the adapter could not be stored and is to
            be; or if layers are to be shared, or to get other ranks, while parameters are partitioned.
        OutOfStepError: if this process fails in the middle of what all do in step: a pass over partitioned parameters
            (ZeRO-3, FSDP2), the reduction of the sums, or writing what ZeRO and FSDP2 keep in parts or in copies.
        WriteError: if the adapter reads back differently from what was written.
        CheckpointError: if the run that was stopped had another number of processes.
        PeerFailed: if another process failed or is gone.

    Whatever else is raised, the model and its adapter are as they were. If a process is gone they are too, unless ZeRO
    or FSDP2 keeps the adapter in parts or in copies.
    """
    model = unwrapped(model)
    config = checked_config(config)
    if is_loader(samples):
        samples, loader_collator = samples_of_loader(samples)
        data_collator = data_collator or loader_collator
    for name, number in (("population_size", population_size), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}={number!r} must be at least 1.")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} must be between 0 and 2**32.")
    if not torch.is_grad_enabled():
        raise ConfigError(
            "Gradients are off, and the statistics are made of them. Call this outside of torch.no_grad() and "
            "torch.inference_mode()."
        )
    ranks = Ranks.current()
    refuse_split_models(model)
    with ranks.together("search for LoRA layers"):
        scan = find_targets(model, adapter_name)
        if config.rank_budget is not None:
            check_resizable(scan.targets)
        if output_dir is not None:
            refuse_unsaveable(model, scan.adapter_name)
    check_fresh(scan.targets)
    least = min(target.rank for target in scan.targets)
    if config.max_rank is not None and config.max_rank < least:
        raise ConfigError(
            f"max_rank={config.max_rank} is below the adapter's rank, {least}, which is solved in any case. Leave it "
            "out, or give more, to store directions for other ranks."
        )
    job = Job(
        model=model,
        config=config,
        ranks=ranks,
        scan=scan,
        compute_loss=model_loss if compute_loss is None else checked_loss(compute_loss),
        collate=DeviceCollator(data_collator or pad_samples, device or input_device(model)),
        seed=first_given(config.seed, seed, DEFAULT_SEED),
        batch_size=first_given(config.batch_size, batch_size, DEFAULT_BATCH_SIZE),
        progress=progress,
        output_dir=Path(output_dir) if output_dir is not None else None,
    )
    if job.output_dir is None and (config.statistics_save_steps is not None or config.save_statistics):
        name = "save_statistics" if config.save_statistics else "statistics_save_steps"
        raise ConfigError(f"{name} needs an output_dir, in or beside which the statistics are kept. Give one.")
    with ranks.together("look at the output folder"):
        if job.output_dir is not None and ranks.is_main:
            check_replaceable(job.output_dir)
    check_same_settings(job, population_size)
    splits = choose_together(job, samples, population_size)
    digests = digest_splits(job, splits)
    return _run(job, splits, digests)


def choose_together(job: Job, samples: Any, population_size: int | None) -> SampleSplits:
    """Choose the same samples on every process: a stream is read by the first one, since others may see other parts."""
    alike = has_positions(samples)
    reads = alike or job.ranks.is_main
    with job.ranks.together("choice of samples"), random_state(job.seed):
        mine = choose_samples(samples, job.config, seed=job.seed, population_size=population_size) if reads else None
    splits = mine if alike else job.ranks.gather(mine)[0]
    assert splits is not None  # the first process reads in any case
    return splits


def first_given(*values: int | None) -> int:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)


def _run(job: Job, splits: SampleSplits, digests: Digests) -> LoRADAReport:
    """Do it all, and put the adapter back as it was if anything fails."""
    with job.restored_on_failure(), job.collate.generators_kept(), contextlib.ExitStack() as files:
        if configs_with(job.model, ROUTER_LOSS):
            job.report.notes.append(
                "the routers' auxiliary loss is left out of statistics and search, unless the loss asks for it itself"
            )
        with prepared_for_pass(job.model, seed=job.seed), outputs_not_rounded(job.model):
            keep_weights_unpacked(job.model)
            with adapters_off(job.scan.targets):
                found = probe(job, splits)
                identity = identify(job, found, digests)
            progress = Progress(job, identity, leaders=set(found.shared.values()), in_step=job.runs_in_lockstep)
            files.enter_context(progress.kept_on_failure())
            solved = None if take_over_finished(job, identity) else _compute(job, found, progress)
        if solved is not None and job.output_dir is not None:
            _save(job, job.output_dir, solved, progress.statistics, identity)
    settle(job.model)
    if job.report.kept and job.ranks.is_main:
        (name, why), *others = job.report.kept.items()
        more = f", and so do {len(others)} more" if others else ""
        logger.warning("LoRA-DA: %s keeps PEFT's own initialisation (%s)%s", name, why, more)
    mark_initialized(job.model, job.scan.adapter_name, may_be_zero=job.report.step_size == 0)
    if job.config.freeze_a:
        freeze_a(job.model, job.scan.adapter_name)
    return job.report


def _compute(job: Job, found: Probe, progress: Progress) -> Solved:
    """Collect, solve, search and write to the adapter."""
    with job.ranks.together("look at the output folder"):
        if job.output_dir is not None and job.ranks.is_main:
            check_writable(job.output_dir)
    with adapters_off(job.scan.targets):
        plan = progress.begin(lambda: plan_windows(job, found))
        job.report.plan = plan.describe(2 * linear_weights(job.model) * found.tokens_per_second)
        job.say(f"LoRA-DA plan: {job.report.plan}")
        found = compare_batch_with_samples(job, found)
        solved = solve_windows(job, found, plan, progress)
        spend_budget(job, solved.solutions)
        step = find_step(job, found.splits, found.settings, solved.solutions)
    write_adapter(job, found.splits, found.settings, solved.solutions, step)
    return solved


def _save(job: Job, folder: Path, solved: Solved, statistics: Path | None, identity: dict[str, Any]) -> None:
    """Write the initialisation to its folder."""
    job.report.artifact = str(folder)
    settle(job.model)  # FSDP2 leaves the root's parameters together after a pass, frozen as they were in it
    with job.stage("save"), job.ranks.stage("save", has_collectives=job.runs_in_lockstep):
        adapter_state = whole_adapter(job.model)
    with job.stage("save"), job.ranks.together("save"):
        if job.ranks.is_main:
            save_init(
                folder,
                model=job.model,
                base_model=job.base_model,
                adapter_state=adapter_state,
                scan=job.scan,
                solutions=solved.solutions,
                statistics=statistics,
                report=job.report,
                identity=identity,
            )
            _read_again(job, folder)


def _read_again(job: Job, folder: Path) -> None:
    """Say at once if what was stored does not pass the checks of those who read it."""
    try:
        load_init(folder, base_model=job.base_model, statistics=False)
    except ArtifactError as error:
        note = f"what was stored cannot be read again, so it is of no use beyond this training ({error})"
        job.report.notes.append(note)
        logger.warning("LoRA-DA: %s. Please report this.", note)
