"""What the stages of one initialisation share."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_da_hf.adapters.resizing import trained_factors
from lora_da_hf.adapters.targets import Target, TargetScan
from lora_da_hf.adapters.write import read_factors, write_factors
from lora_da_hf.artifacts.manifest import BaseModelFacts
from lora_da_hf.collator import DeviceCollator
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.parameters import is_partitioned, is_whole, read_full, settle, write_full
from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.report import LoRADAReport
from lora_da_hf.statistics.batches import Lockstep
from lora_da_hf.statistics.collect import PassSettings, evaluate_loss
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.model_state import seed_generators
from lora_da_hf.statistics.token_masks import SingleSamplesNeeded

logger = logging.getLogger(__name__)

_MORE_FOR_SOME = 2


@dataclass(kw_only=True)
class Job:
    """One initialisation: what it works on, how, and the report it fills.

    Attributes:
        model: The model with its adapter.
        config: The settings.
        ranks: The processes that share the work.
        scan: The adapter's layers.
        compute_loss: The loss.
        collate: Makes batches on the model's device.
        seed: Of every random choice.
        batch_size: Samples run together.
        progress: Whether to show progress bars.
        output_dir: Where the initialisation is written; None: nowhere.
        targets: The layers to initialise, by name.
        max_ranks: The rank that each is solved and stored at.
        trained: Whether A and B of each are, once the pass is over.
        report: What was done so far.
        undo: What puts the adapter's ranks back if the initialisation fails.
        replaced: Parameters of modules trained beside the adapter that got stored weights, with what they held before.
    """

    model: nn.Module
    config: LoRADAConfig
    ranks: Ranks
    scan: TargetScan
    compute_loss: ComputeLoss
    collate: DeviceCollator
    seed: int
    batch_size: int
    progress: bool
    output_dir: Path | None
    targets: dict[str, Target] = field(init=False)
    max_ranks: dict[str, int] = field(init=False)
    trained: dict[str, tuple[bool, bool]] = field(init=False)
    report: LoRADAReport = field(init=False)
    undo: list[Callable[[], None]] = field(init=False, default_factory=list[Callable[[], None]])
    replaced: list[tuple[nn.Parameter, Tensor]] = field(init=False, default_factory=list[tuple[nn.Parameter, Tensor]])

    def __post_init__(self) -> None:
        self.targets = {target.name: target for target in self.scan.targets}
        self.trained = {target.name: trained_factors(target) for target in self.scan.targets}
        largest = max(target.rank for target in self.scan.targets)
        largest = self.config.max_rank or (largest if self.config.rank_budget is None else _MORE_FOR_SOME * largest)
        self.max_ranks = {t.name: min(max(largest, t.rank), t.in_features) for t in self.scan.targets}
        self.report = LoRADAReport(
            config=self.config.to_dict(), kept=dict(self.scan.kept), adapter_name=self.scan.adapter_name, seed=self.seed
        )

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Add the time of the block to the report."""
        start = time.perf_counter()
        yield
        self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def restored_on_failure(self) -> Generator[None]:
        """Put the adapter back as it was if the block fails, as far as that takes no process that is gone."""
        with self.ranks.stage("copy of the adapter", has_collectives=self.writes_in_step):
            before = {name: read_factors(target) for name, target in self.targets.items()}
            magnitudes = [t.magnitude.weight for t in self.targets.values() if t.magnitude is not None]
            kept = [(parameter, read_full(parameter)) for parameter in magnitudes]
        try:
            yield
        except BaseException as error:
            for undo in reversed(self.undo):
                undo()
            together = self.ranks.all_fail_with(error)
            for name, factors in before.items():
                if together or _is_whole(self.targets[name]):
                    write_factors(self.targets[name], *factors)
            for parameter, value in (*self.replaced, *kept):
                if together or is_whole(parameter):
                    write_full(parameter, value)
            if together:
                settle(self.model)
            raise

    def bar(self, total: int, text: str) -> Any:
        """Make a progress bar, which only the main process shows."""
        return tqdm(total=total, desc=text, disable=not (self.progress and self.ranks.is_main), leave=False)

    def say(self, text: str) -> None:
        """Tell what goes on: in the log or, if that takes no such news, beside the progress bars if they are shown."""
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", text)
        elif self.progress and self.ranks.is_main:
            tqdm.write(text, file=sys.stderr)

    @functools.cached_property
    def runs_in_lockstep(self) -> bool:
        """Whether the processes have to run the model in step, since each holds a part of its parameters."""
        return self.ranks.size > 1 and is_partitioned(self.model)

    @functools.cached_property
    def writes_in_step(self) -> bool:
        """Whether the processes have to write the adapter in step, since each holds a part of it or of a copy."""
        return self.ranks.size > 1 and not all(map(_is_whole, self.scan.targets))

    @functools.cached_property
    def base_model(self) -> BaseModelFacts:
        """What `base_model_facts` finds, by all processes together the first time."""
        with self.ranks.stage("fingerprint", has_collectives=self.runs_in_lockstep):
            return base_model_facts(self.model)

    def lockstep(self, samples: list[Any], stage: str) -> Lockstep:
        """Return how the processes keep in step over samples that they share, where they need to."""
        if not self.runs_in_lockstep or not samples:
            return Lockstep.of_one()
        return Lockstep(
            most=lambda number: max(self.ranks.gather(number)),
            filler=samples[0],
            alike=lambda: self.ranks.alike(stage, SingleSamplesNeeded),
            in_step=lambda: self.ranks.in_step(stage),
        )

    def loss(self, samples: list[Any], settings: PassSettings, compute_loss: ComputeLoss | None = None) -> float:
        """Return the mean loss over samples, shared by the processes and the same on all of them.

        A collator that draws at random makes the same batches at each call.
        """
        seed_generators(self.seed)
        with self.ranks.together("evaluation"), self.collate.generators_kept():
            mine = evaluate_loss(
                self.model,
                self.ranks.share(samples),
                collate=self.collate,
                compute_loss=compute_loss or self.compute_loss,
                settings=settings,
                batch_size=self.batch_size,
                lockstep=self.lockstep(samples, "evaluation"),
            )
        total, count = self.ranks.sum(mine)
        return total / count if count else float("nan")


def _is_whole(target: Target) -> bool:
    """Tell whether a layer's factors can be written by this process alone; a frozen one may be, and the other not."""
    return is_whole(target.lora_A) and is_whole(target.lora_B)
