"""What does not change in the course of an initialisation, and what every stage does with it."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lora_da_hf.adapters.targets import Target, TargetScan, check_ready, find_targets, keep_weights_unpacked
from lora_da_hf.artifacts.manifest import BaseModelFacts
from lora_da_hf.collator import DeviceCollator, RawCollate
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.parameters import (
    is_whole,
    outputs_not_rounded,
    read_full,
    refuse_split_models,
    settle,
    write_full,
)
from lora_da_hf.distributed.processes import Processes
from lora_da_hf.errors import ConfigError
from lora_da_hf.losses import checked_loss, input_device, model_loss
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.collect import PassSettings, evaluate_losses, in_batches
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.model_state import prepared_for_pass, seed_generators
from lora_da_hf.theory.line_search import Losses

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
DEFAULT_SEED = 42


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one initialisation works on, and how; `stage` notes the seconds that each stage takes."""

    model: nn.Module
    config: LoRADAConfig
    processes: Processes
    scan: TargetScan
    compute_loss: ComputeLoss
    collate: DeviceCollator
    seed: int
    batch_size: int
    progress: bool
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @functools.cached_property
    def targets(self) -> dict[str, Target]:
        """The layers to initialise, by name."""
        return {target.name: target for target in self.scan.targets}

    @functools.cached_property
    def max_ranks(self) -> dict[str, int]:
        """The rank that each layer is solved and stored at."""
        largest = self.config.max_rank or max(target.rank for target in self.scan.targets)
        return {t.name: min(max(largest, t.rank), t.in_features) for t in self.scan.targets}

    @functools.cached_property
    def base_model(self) -> BaseModelFacts:
        """What `base_model_facts` finds, by all processes together the first time."""
        return base_model_facts(self.model)

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def bar(self, total: int, text: str) -> Any:
        """Make a progress bar, which only the main process shows."""
        return tqdm(total=total, desc=text, disable=not (self.progress and self.processes.is_main), leave=False)

    def say(self, text: str) -> None:
        """Tell what goes on: in the log if it takes INFO, else beside the progress bars."""
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", text)
        elif self.progress and self.processes.is_main:
            tqdm.write(text, file=sys.stderr)

    def losses(self, samples: list[Any], settings: PassSettings) -> Losses:
        """Return the loss of each of some samples, which the processes share."""
        seed_generators(self.seed)
        mine = self.processes.share(samples)
        with self.collate.generators_kept():
            found = in_batches(apart(settings, len(samples)), functools.partial(evaluate_losses, mine))
        return Losses(tuple(batch for part in self.processes.gather(found) for batch in part))

    @contextlib.contextmanager
    def prepared(self) -> Generator[None]:
        """Make the model ready for passes inside the context."""
        with prepared_for_pass(self.model, seed=self.seed), outputs_not_rounded(self.model):
            keep_weights_unpacked(self.model)
            yield

    @contextlib.contextmanager
    def restored_on_failure(self, others: Mapping[str, nn.Parameter] | None = None) -> Generator[None]:
        """Put the adapter, and other parameters, back as they were if the block fails.

        What takes several processes, the parts and copies that DeepSpeed and FSDP2 keep, is left.
        """
        alone = self.processes.count == 1
        factors = [factor for target in self.scan.targets for factor in (target.lora_A, target.lora_B)]
        magnitudes = [target.magnitude.weight for target in self.scan.targets if target.magnitude is not None]
        written = (*factors, *magnitudes, *(others or {}).values())
        before = [(parameter, read_full(parameter)) for parameter in written if alone or is_whole(parameter)]
        try:
            yield
        except BaseException:
            for parameter, value in before:
                write_full(parameter, value)
            if alone:
                settle(self.model)
            raise


def make_job(
    model: nn.Module,
    config: LoRADAConfig,
    compute_loss: ComputeLoss | None,
    data_collator: RawCollate | None,
    batch_size: int | None,
    *,
    seed: int | None,
    device: torch.device | None,
    progress: bool,
) -> Job:
    """Find the layers of a fresh adapter, and check what is given beside the settings."""
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} must be at least 1.")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} must be between 0 and 2**32.")
    refuse_split_models(model)
    scan = find_targets(model)
    check_ready(scan.targets)
    return Job(
        model=model,
        config=config,
        processes=Processes.current(),
        scan=scan,
        compute_loss=model_loss if compute_loss is None else checked_loss(compute_loss),
        collate=DeviceCollator(data_collator or pad_samples, device or input_device(model)),
        seed=DEFAULT_SEED if seed is None else seed,
        batch_size=config.batch_size or batch_size or DEFAULT_BATCH_SIZE,
        progress=progress,
    )


def apart(settings: PassSettings, num_samples: int) -> PassSettings:
    """Have samples run one at a time: their losses, and the error of the mean, are then those of any processes.

    Where the loss is one of batches there are four, so that they, too, tell an error.
    """
    least = max(2, num_samples // 4) if settings.reduction.kind == "batch" else 1
    return replace(settings, batch_size=min(settings.batch_size, least))
