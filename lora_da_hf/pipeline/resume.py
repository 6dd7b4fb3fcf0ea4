"""What a running initialisation leaves on disk, so that one that was killed is taken up where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_da_hf.artifacts.checkpoint import CheckpointFolder
from lora_da_hf.artifacts.statistics_store import save_statistics
from lora_da_hf.errors import ArtifactError, CheckpointError
from lora_da_hf.pipeline.gather import PassCounts
from lora_da_hf.pipeline.identity import changes
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.memory import budget_bytes
from lora_da_hf.pipeline.plan import Plan
from lora_da_hf.pipeline.save import leaders_of
from lora_da_hf.pipeline.solve import (
    SOLUTION_TENSORS,
    Outcome,
    SolvedWindow,
    describe,
    outcome_of,
    share_outcomes,
)
from lora_da_hf.statistics.pass_state import PassState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedWindow:
    """What a finished window leaves behind, the same on every process.

    Attributes:
        outcomes: By layer.
        shared: The leader of each of its layers.
        counts: What its passes counted.
    """

    outcomes: dict[str, Outcome]
    shared: dict[str, str]
    counts: PassCounts


class Progress:
    """The files of a running initialisation. Without ``statistics_save_steps`` there are statistics at most.

    Args:
        job: The job.
        identity: What `identify` returned.
        leaders: Of the groups of layers that share an input.
        in_step: Whether the processes have to run the model in step, and so go on from the same batch.
    """

    def __init__(self, job: Job, identity: Mapping[str, Any], *, leaders: Collection[str], in_step: bool) -> None:
        self._job = job
        self._leaders = sorted(leaders)
        self._identity = dict(identity)
        self._in_step = in_step
        self._every = job.config.statistics_save_steps
        self._folder = None if job.output_dir is None else CheckpointFolder(job.output_dir, job.ranks.rank)
        self._has_begun = False

    def begin(self, make_plan: Callable[[], Plan]) -> Plan:
        """Return the plan of the run that was killed, if it was the same one, or make one.

        Raises:
            CheckpointError: if it was the same one on another number of processes.
        """
        if self._folder is None or self._every is None:
            self._drop_unasked()
            self._has_begun = True
            return make_plan()
        job = self._job
        with job.ranks.together("checkpoint"):
            mine = self._read_run(self._folder) if job.ranks.is_main else None
        earlier = job.ranks.gather(mine)[0]
        values: dict[str, Any]
        if earlier is not None and not self._differences(earlier):
            if earlier["num_processes"] != job.ranks.size:
                raise CheckpointError(
                    f"{self._folder.path} holds the sums of {earlier['num_processes']} processes that were stopped, "
                    f"and there are {job.ranks.size} now. Start as many as before, or delete that folder to start over."
                )
            job.say(f"LoRA-DA goes on with the run that was stopped, from {self._folder.path}")
            values = earlier
        else:
            values = {
                "identity": self._identity,
                "batch_size": job.batch_size,
                "leaders": self._leaders,
                "num_processes": job.ranks.size,
                "save_statistics": job.config.save_statistics,
                "plan": make_plan().to_dict(),
            }
        with job.ranks.together("checkpoint"):
            self._folder.begin(values)
        self._has_begun = True
        return Plan.from_dict(values["plan"])

    def _read_run(self, folder: CheckpointFolder) -> dict[str, Any] | None:
        """Return what a run that was stopped left; None if it cannot be read, as sums carry the hash of their run."""
        try:
            return folder.read_run()
        except ArtifactError as error:
            logger.warning("LoRA-DA: %s", error)
            return None

    def _note_dropped(self, why: str) -> None:
        note = f"the files of a run that was stopped were dropped: {why}"
        self._job.report.notes.append(note)
        logger.warning("LoRA-DA: %s", note)

    def _differences(self, earlier: Mapping[str, Any]) -> list[str]:
        found = changes(earlier.get("identity"), self._identity)
        if earlier.get("batch_size") != self._job.batch_size:
            found.append("batch size")
        if earlier.get("leaders") != self._leaders:
            found.append("set of layers that share an input, as another gradient checkpointing makes it")
        if earlier.get("save_statistics") != self._job.config.save_statistics:
            found.append("save_statistics")
        if not found:  # else it may be of another version, whose plan cannot be read
            found = self._differences_of_plan(Plan.from_dict(earlier["plan"]))
        if found:
            self._note_dropped(f"it had another {', '.join(found)}")
        return found

    def _differences_of_plan(self, plan: Plan) -> list[str]:
        config, found = self._job.config, list[str]()
        if config.memory_budget is not None and budget_bytes(config.memory_budget) < plan.peak_bytes:
            found.append("memory budget, below what its plan takes")
        if config.schedule not in ("auto", plan.schedule):
            found.append("schedule")
        if self._in_step and not found and plan.schedule == "layers":
            found.append("way to share the parameters")  # they were whole: alone with its layers, a process would hang
        return found

    def _drop_unasked(self) -> None:
        """Delete what a killed run left, which is not gone on with unless new sums are kept."""
        with self._job.ranks.together("checkpoint"):
            if self._folder is not None and self._job.ranks.is_main and self._folder.has_run():
                self._note_dropped("statistics_save_steps is not set")
            self._clear()

    def store(self, window: int) -> PassFiles | None:
        """Return where this process keeps its sums of a window; None if nowhere."""
        if self._folder is None or self._every is None:
            return None
        positions = self._folder.sums(window)
        if self._in_step:
            everywhere = set.intersection(*map(set, self._job.ranks.gather(positions)))
            positions = sorted(everywhere, reverse=True)
        return PassFiles(self._folder, window, every=self._every, position=positions[0] if positions else None)

    def finished(self, window: int) -> FinishedWindow | None:
        """Return what came of a window before the run was stopped; None if it was not finished."""
        if self._folder is None or self._every is None:
            return None
        ranks = self._job.ranks
        with ranks.together("checkpoint"):
            found = self._folder.read_window(window) if ranks.is_main else None
        tensors, values = found or ({}, None)
        values = ranks.gather(values)[0]
        if values is None:
            return None
        with ranks.together("checkpoint"):
            mine = _outcomes(values["outcomes"], tensors) if ranks.is_main else {}
        outcomes = share_outcomes(self._job, mine)
        return FinishedWindow(outcomes=outcomes, shared=values["shared"], counts=PassCounts(**values["counts"]))

    def finish(self, number: int, finished: FinishedWindow, solved: SolvedWindow) -> None:
        """Keep what came of a window, before its statistics are released."""
        if self._folder is None:
            return
        with self._job.ranks.together("checkpoint"):
            if solved.statistics and self._job.ranks.is_main:
                names = {name for name, outcome in finished.outcomes.items() if not isinstance(outcome, str)}
                statistics = {name: solved.statistics[name] for name in finished.shared if name in names}
                save_statistics(self._folder.statistics, statistics, leaders_of(finished.shared, names), part=number)
            if self._every is not None and self._job.ranks.is_main:
                self._folder.write_window(number, *_as_file(finished))

    @property
    def statistics(self) -> Path | None:
        """The folder with the statistics of all windows; None if they are not stored."""
        if self._folder is None or not self._job.config.save_statistics:
            return None
        return self._folder.statistics

    @contextlib.contextmanager
    def kept_on_failure(self) -> Generator[None]:
        """Delete the files at the end of the block, unless it fails and another run can go on from them.

        Those of a run with other settings that was stopped stay where this one made none: it was finished already.
        """
        try:
            yield
        except BaseException:
            if self._every is None and self._has_begun:
                self._clear()
            raise
        if self._has_begun or self._is_mine():
            self._clear()

    def _is_mine(self) -> bool:
        """Tell whether the files that are there are of this run, which was killed when it was done."""
        earlier = None if self._folder is None else self._read_run(self._folder)
        return earlier is not None and not changes(earlier.get("identity"), self._identity)

    def _clear(self) -> None:
        if self._folder is not None:
            self._folder.remove()


class PassFiles:
    """The sums of one process in one window, on disk.

    Attributes:
        every: Batches from one file to the next.
    """

    def __init__(self, folder: CheckpointFolder, window: int, *, every: int, position: int | None) -> None:
        self.every = every
        self._folder = folder
        self._window = window
        self._position = position

    def load(self) -> PassState | None:
        """Return the sums to go on from, if there are any."""
        if self._position is None:
            return None
        tensors, facts = self._folder.read_sums(self._window, self._position)
        return PassState(tensors=tensors, facts=facts)

    def save(self, state: PassState) -> None:
        """Write the sums, and keep those before."""
        self._folder.write_sums(self._window, state.facts["batches_done"], state.tensors, state.facts)

    def clear(self) -> None:
        """Delete the sums: the pass starts over."""
        self._folder.delete_sums(self._window)


def _as_file(finished: FinishedWindow) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    outcomes: dict[str, Any] = {}
    for name, outcome in finished.outcomes.items():
        if isinstance(outcome, str):
            outcomes[name] = outcome
        else:
            outcomes[name] = describe(*outcome)
            tensors |= {f"{name}.{which}": getattr(outcome[0], which) for which in SOLUTION_TENSORS}
    values = {"outcomes": outcomes, "shared": finished.shared, "counts": dataclasses.asdict(finished.counts)}
    return tensors, values


def _outcomes(outcomes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Outcome]:
    return {
        name: facts
        if isinstance(facts, str)
        else outcome_of(facts, {which: tensors[f"{name}.{which}"] for which in SOLUTION_TENSORS})
        for name, facts in outcomes.items()
    }
