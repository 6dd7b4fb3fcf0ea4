"""An initialisation from beginning to end: the one place where the parts meet."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_da_hf.adapters.targets import Target, TargetScan, find_targets, freeze_a
from lora_da_hf.adapters.trial import TrialAdapters
from lora_da_hf.adapters.write import read_factors, update_norm, write_factors
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.ranks import Ranks, balanced_owners
from lora_da_hf.distributed.reduce import input_groups, reduce_statistics
from lora_da_hf.errors import DataError, SolveError, TapNotCalledError
from lora_da_hf.losses import input_device, max_sample_length, model_loss, shifts_labels
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.samples import (
    RawCollate,
    SampleSplits,
    choose_samples,
    is_loader,
    on_device,
    pad_samples,
    samples_of_loader,
)
from lora_da_hf.save import save_init
from lora_da_hf.statistics.collect import PassResult, PassSettings, check_lengths, collect, evaluate_loss
from lora_da_hf.statistics.losses import Collate, ComputeLoss, find_reduction
from lora_da_hf.statistics.model_state import prepared_for_pass
from lora_da_hf.statistics.taps import Taps, find_shared_inputs
from lora_da_hf.statistics.token_masks import read_batch_tokens
from lora_da_hf.theory.adapter_factors import paper_step_size, split_factors
from lora_da_hf.theory.line_search import LineSearchResult, line_search
from lora_da_hf.theory.solve import factorize, solve_layer

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
    lower the loss. In a run of several processes each must call this with the same samples, and they share the work.

    Args:
        model: A PEFT model with a fresh LoRA adapter, not wrapped in DDP.
        samples: A list or data set of tokenised samples, a stream of them, or a data loader.
        config: The settings; None: ``LoRADAConfig()``.
        population_size: N, how many samples training draws from; None: the config's, or the number of samples.
        compute_loss: Maps model, batch and number of items to a scalar loss, dividing the sum over labels by the
            number of items unless that is None; None: the loss that the model returns.
        data_collator: Makes a batch of a list of samples; None: the loader's, or padding on the right.
        adapter_name: The adapter; None: the active one.
        output_dir: Where to write the initialisation, as a folder of its own; None: nowhere.
        batch_size: Used if the config gives none.
        seed: Used if the config gives none.
        device: Where batches go; None: where the embeddings are.
        progress: Whether to show progress bars.

    Returns:
        What was done, layer by layer.

    Raises:
        TargetError: if there is nothing that can be initialised.
        AdapterAlreadyTrainedError: if the adapter is not a fresh one.
        DataError: if the samples cannot be used.
        StatisticsError: if the pass fails, or a layer's tap was never called.
        SolveError: if no layer can be solved.

    Whatever is raised, the model and its adapter are as they were.
    """
    config = config or LoRADAConfig()
    if is_loader(samples):
        samples, loader_collator = samples_of_loader(samples)
        data_collator = data_collator or loader_collator
    job = _Job(
        model=model,
        config=config,
        ranks=Ranks.current(),
        scan=find_targets(model, adapter_name),
        compute_loss=compute_loss or model_loss,
        collate=on_device(data_collator or pad_samples, device or input_device(model)),
        seed=_first(config.seed, seed, DEFAULT_SEED),
        batch_size=_first(config.batch_size, batch_size, DEFAULT_BATCH_SIZE),
        progress=progress,
    )
    splits = choose_samples(samples, config, seed=job.seed, population_size=population_size)
    return job.run(splits, Path(output_dir) if output_dir is not None else None)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """What solving gives: the solution of each layer, and the statistics if they are to be stored."""

    solutions: dict[str, LayerSolution]
    statistics: dict[str, LayerStatistics]


@dataclass(kw_only=True)
class _Job:
    """One initialisation."""

    model: nn.Module
    config: LoRADAConfig
    ranks: Ranks
    scan: TargetScan
    compute_loss: ComputeLoss
    collate: Collate
    seed: int
    batch_size: int
    progress: bool

    def __post_init__(self) -> None:
        self.report = LoRADAReport(config=self.config.to_dict(), kept=dict(self.scan.kept))
        self.targets = {target.name: target for target in self.scan.targets}

    def run(self, splits: SampleSplits, output_dir: Path | None) -> LoRADAReport:
        """Do it all, and put the adapter back as it was if anything fails."""
        before = {name: read_factors(target) for name, target in self.targets.items()}
        try:
            with prepared_for_pass(self.model, seed=self.seed):
                settings, shared = self._probe(splits)
                result = self._collect(splits, settings, shared)
                solved = self._solve(result, shared, splits.population_size)
                step, by_rank = self._find_step(splits, settings, solved.solutions)
                self._write(splits, settings, solved.solutions, step)
            if output_dir is not None:
                self._save(output_dir, solved, shared, by_rank)
        except BaseException:
            for name, (lora_A, lora_B) in before.items():
                write_factors(self.targets[name], lora_A, lora_B)
            raise
        if self.config.freeze_a:
            freeze_a(self.model, self.scan.adapter_name)
        return self.report

    @contextlib.contextmanager
    def _stage(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - start

    def _bar(self, total: int, text: str) -> Any:
        return tqdm(total=total, desc=text, disable=not (self.progress and self.ranks.is_main), leave=False)

    # ---- the pass

    def _probe(self, splits: SampleSplits) -> tuple[PassSettings, dict[str, str]]:
        """Learn from one or two samples how the loss is made and which layers share an input."""
        shifts = shifts_labels(self.model)
        with self._stage("probe"), self.ranks.together("probe"):
            check_lengths([*splits.statistics, *splits.search, *splits.unseen], max_sample_length(self.model))
            labelled = self._labelled(splits.statistics, shifts, count=2)
            first = self.collate(labelled[:1])
            layers = {name: target.base_layer for name, target in self.targets.items()}

            def run_forward() -> None:
                with torch.no_grad():
                    self.compute_loss(self.model, first, None)

            shared = find_shared_inputs(layers, run_forward)
            batch_size = min(self.batch_size, max(1, len(splits.statistics)))
            reduction = find_reduction(
                self.compute_loss, self.model, self.collate, labelled, declared=self.config.loss_reduction
            )
        settings = PassSettings(
            batch_size=batch_size,
            token_mask=self.config.token_mask,
            shifts_labels=shifts,
            reduction=reduction,
        )
        self.report.loss_reduction = f"{reduction.kind} ({reduction.reason})"
        self.report.population_size = splits.population_size
        self.report.notes += splits.notes
        return settings, shared

    def _labelled(self, samples: list[Any], shifts: bool, count: int) -> list[Any]:
        found: list[Any] = []
        for sample in samples:
            if read_batch_tokens(self.collate([sample]), shifts_labels=shifts).num_labelled:
                found.append(sample)
                if len(found) == count:
                    break
        if not found:
            raise DataError(
                f"None of the {len(samples)} samples has a label that counts (all are -100). Check how labels are "
                "masked, and that samples are not truncated before their completion begins."
            )
        return found

    def _collect(self, splits: SampleSplits, settings: PassSettings, shared: dict[str, str]) -> PassResult:
        mine = self.ranks.share(splits.statistics)
        layers = {name: self.targets[name].base_layer for name in shared}

        def make_taps() -> Taps:
            return Taps(
                layers,
                widths={name: (self.targets[name].in_features, self.targets[name].out_features) for name in shared},
                shared_inputs=shared,
                devices={name: self.targets[name].device for name in shared},
                dtype=getattr(torch, self.config.accumulate_dtype),
            )

        with self._stage("statistics"):
            with self._bar(len(mine), "LoRA-DA statistics") as bar, self.ranks.together("statistics pass"):
                result = collect(
                    self.model,
                    mine,
                    collate=self.collate,
                    compute_loss=self.compute_loss,
                    settings=settings,
                    make_taps=make_taps,
                    on_samples=bar.update,
                )
            self._count(result)
        return result

    def _count(self, result: PassResult) -> None:
        labelled, unlabelled = self.ranks.sum([result.num_samples, result.num_unlabelled])
        self.report.num_samples, self.report.num_unlabelled = int(labelled), int(unlabelled)
        gathered = self.ranks.gather((result.batch_size, result.notes, result.sample_digests))
        self.report.batch_size = min(size for size, _, _ in gathered)
        self.report.notes += sorted({note for _, notes, _ in gathered for note in notes})
        if unlabelled:
            self.report.notes.append(f"{int(unlabelled)} samples have no label and were left out")
        digests = [digests for _, _, digests in gathered]
        ordered = [d[i] for i in range(max(map(len, digests))) for d in digests if i < len(d)]
        self.report.data_fingerprint = hashlib.sha256("".join(ordered).encode()).hexdigest()
        self._check_called(result.taps)

    def _check_called(self, taps: Taps) -> None:
        """Find the layers that no sample went through, or that the loss does not depend on."""
        names = list(taps.taps)
        calls = self.ranks.sum([float(taps.taps[name].forward_calls) for name in names])
        returns = self.ranks.sum([float(taps.taps[name].backward_calls) for name in names])
        uncalled = [name for name, number in zip(names, calls, strict=True) if not number]
        if uncalled and (self.config.uncalled_layers == "error" or len(uncalled) == len(names)):
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
                self.report.kept[name] = "no sample goes through it"
            elif not returned:
                self.report.kept[name] = "the loss does not depend on it"

    # ---- the solve

    def _solve(self, result: PassResult, shared: dict[str, str], population_size: int) -> _Solved:
        """Reduce each group of layers to its owner, solve it there, and give the solution to everybody."""
        groups = input_groups(shared)
        size = 1 if self.config.save_statistics else self.ranks.size
        owners = balanced_owners({leader: self._cost(leader, members) for leader, members in groups.items()}, size)
        solved = _Solved(solutions={}, statistics={})
        mine: dict[str, tuple[LayerSolution, LayerReport] | str] = {}
        reduced = reduce_statistics(result.taps, groups, owners, self.ranks, num_samples=self.report.num_samples)
        with self._stage("solve"), self._bar(len(groups), "LoRA-DA solve") as bar:
            with self.ranks.together("solve"):
                failure: Exception | None = None
                for leader, statistics in reduced:  # every rank must reduce every group, whatever fails
                    if failure is None:
                        try:
                            mine.update(self._solve_group(leader, statistics, population_size))
                        except Exception as error:
                            failure = error
                    if self.config.save_statistics:
                        solved.statistics.update(statistics)
                    bar.update(1)
                if failure is not None:
                    raise failure
            self._exchange(mine, groups, owners, solved.solutions)
        if not solved.solutions:
            raise SolveError("No layer could be solved: " + "; ".join(f"{n}: {r}" for n, r in self.report.kept.items()))
        return solved

    def _cost(self, leader: str, members: list[str]) -> float:
        d_in = self.targets[leader].in_features
        return d_in**3 / 3 + sum(4 * d_in * d_in * self.targets[name].out_features for name in members)

    def _max_rank(self, target: Target) -> int:
        largest = self.config.max_rank or max(t.rank for t in self.targets.values())
        return min(max(largest, target.rank), target.in_features)

    def _solve_group(
        self, leader: str, statistics: dict[str, LayerStatistics], population_size: int
    ) -> dict[str, tuple[LayerSolution, LayerReport] | str]:
        found: dict[str, tuple[LayerSolution, LayerReport] | str] = {}
        names = [name for name in statistics if name not in self.report.kept]
        if not names:
            return found
        factorized = factorize(statistics[names[0]], self.config, layer=leader)
        for name in names:
            target = self.targets[name]
            if not statistics[name].weight_grad.any():
                found[name] = "its gradient is zero"
                continue
            solution = solve_layer(
                statistics[name],
                factorized,
                self.config,
                layer=name,
                rank=self._max_rank(target),
                population_size=population_size,
            )
            found[name] = (solution, _layer_report(target, statistics[name], solution))
        return found

    def _exchange(
        self,
        mine: dict[str, tuple[LayerSolution, LayerReport] | str],
        groups: dict[str, list[str]],
        owners: dict[str, int],
        solutions: dict[str, LayerSolution],
    ) -> None:
        """Give every process every solution, in the model's order."""
        if self.ranks.size == 1:
            everything = mine
        else:
            on_cpu = {n: v if isinstance(v, str) else (_solution_to(v[0], "cpu"), v[1]) for n, v in mine.items()}
            everything = {name: v for part in self.ranks.gather(on_cpu) for name, v in part.items()}
        for name, target in self.targets.items():
            value = everything.get(name)
            if isinstance(value, str):
                self.report.kept[name] = value
            elif value is not None:
                solutions[name] = _solution_to(value[0], target.device)
                self.report.layers.append(value[1])

    # ---- the step

    def _find_step(
        self, splits: SampleSplits, settings: PassSettings, solutions: dict[str, LayerSolution]
    ) -> tuple[float | None, dict[int, float]]:
        """Return the step (None: by `stable_gamma`), and the searched step for a ladder of ranks."""
        self.report.num_search_samples, self.report.num_unseen_samples = (
            len(splits.search),
            len(splits.unseen),
        )
        if splits.unseen:
            with self._stage("evaluate"):
                self.report.unseen_loss_before = self._loss(splits.unseen, settings)
        if not self.config.searches_step:
            step = None if self.config.step_size is None else float(self.config.step_size)
            self.report.step_size = step
            return step, {}
        bases = {name: (solution.basis_A, solution.basis_B) for name, solution in solutions.items()}
        with self._stage("line search"):
            baseline = self._loss(splits.search, settings)
            with TrialAdapters([self.targets[name] for name in solutions], bases) as trial:
                found = self._search(trial, splits.search, settings, baseline, rank=None, start=0.1)
                by_rank = self._search_ladder(trial, splits.search, settings, baseline, found)
        self.report.search_loss_before = baseline
        self.report.search = list(found.evaluations)
        self.report.step_size = found.step_size
        self.report.step_size_by_rank = by_rank
        if not found.helped:
            self.report.notes.append(
                "no step lowers the loss on the search samples: B is zero, training starts at the base"
            )
        return found.step_size, by_rank

    def _search(
        self,
        trial: TrialAdapters,
        samples: list[Any],
        settings: PassSettings,
        baseline: float,
        *,
        rank: int | None,
        start: float,
        factor: float = 10**0.5,
    ) -> LineSearchResult:
        def evaluate(step: float) -> float:
            trial.rank, trial.step_size = rank, step
            return self._loss(samples, settings)

        return line_search(evaluate, baseline=baseline, start=start, factor=factor, refine=rank is None)

    def _search_ladder(
        self,
        trial: TrialAdapters,
        samples: list[Any],
        settings: PassSettings,
        baseline: float,
        found: LineSearchResult,
    ) -> dict[int, float]:
        """Search the step for powers of two below the largest rank, on a part of the samples, from its neighbour's."""
        ranks = sorted({target.rank for target in self.targets.values()}, reverse=True)
        largest = max(self._max_rank(target) for target in self.targets.values())
        by_rank = {ranks[0]: found.step_size} if len(ranks) == 1 else {}
        ladder = {2**k for k in range(largest.bit_length()) if 2**k <= largest} | {largest}
        part = samples[: max(4, len(samples) // 4)]
        part_baseline = self._loss_at(trial, part, settings, 0.0) if len(part) < len(samples) else baseline
        start = found.step_size or 0.1
        for rank in sorted(ladder - set(by_rank), reverse=True):
            result = self._search(trial, part, settings, part_baseline, rank=rank, start=start, factor=2.0)
            by_rank[rank] = result.step_size
            start = result.step_size or start
        return dict(sorted(by_rank.items()))

    def _loss_at(self, trial: TrialAdapters, samples: list[Any], settings: PassSettings, step: float) -> float:
        trial.step_size = step
        return self._loss(samples, settings)

    def _loss(self, samples: list[Any], settings: PassSettings) -> float:
        with self.ranks.together("evaluation"):
            mine = evaluate_loss(
                self.model,
                self.ranks.share(samples),
                collate=self.collate,
                compute_loss=self.compute_loss,
                settings=settings,
                batch_size=self.batch_size,
            )
        total, count = self.ranks.sum(mine)
        return total / count if count else float("nan")

    # ---- the write

    def _write(
        self,
        splits: SampleSplits,
        settings: PassSettings,
        solutions: dict[str, LayerSolution],
        step: float | None,
    ) -> None:
        with self._stage("write"):
            self._write_step(solutions, step)
        if splits.search:
            with self._stage("line search"):
                after = self._loss(splits.search, settings)
            before = self.report.search_loss_before
            if before is not None and not after <= before:
                self.report.notes.append(
                    f"step {step:.4g} gave a loss of {after:.6f} once it was stored in the adapter's dtype, above the "
                    f"base's {before:.6f}: B is zero instead"
                )
                self._write_step(solutions, 0.0)
                self.report.step_size, after = 0.0, before
            self.report.search_loss_after = after
        if splits.unseen:
            with self._stage("evaluate"):
                self.report.unseen_loss_after = self._loss(splits.unseen, settings)
        for layer in self.report.layers:
            layer.update_norm = update_norm(self.targets[layer.name])

    def _write_step(self, solutions: dict[str, LayerSolution], step: float | None) -> None:
        for name, solution in solutions.items():
            write_factors(self.targets[name], *self._factors(self.targets[name], solution, step))

    def _factors(self, target: Target, solution: LayerSolution, step: float | None) -> tuple[Tensor, Tensor]:
        basis_A, basis_B = solution.at_rank(target.rank)
        if step == 0.0:  # the subspace without the step: what is written stays a no-op
            lora_A, lora_B = split_factors(
                basis_A, basis_B, peft_scaling=target.peft_scaling, step_size=1.0, factor_split="default_norm"
            )
            return lora_A, torch.zeros_like(lora_B)
        if step is None:
            step = paper_step_size(target.peft_scaling, self.config.stable_gamma)
        return split_factors(
            basis_A,
            basis_B,
            peft_scaling=target.peft_scaling,
            step_size=step,
            factor_split=self.config.factor_split,
        )

    def _save(self, output_dir: Path, solved: _Solved, shared: dict[str, str], by_rank: dict[int, float]) -> None:
        with self._stage("save"), self.ranks.together("save"):
            self.report.artifact = str(output_dir)
            if self.ranks.is_main:
                save_init(
                    output_dir,
                    model=self.model,
                    scan=self.scan,
                    solutions=solved.solutions,
                    statistics=solved.statistics,
                    shared_inputs=shared,
                    report=self.report,
                    seed=self.seed,
                )


def _layer_report(target: Target, statistics: LayerStatistics, solution: LayerSolution) -> LayerReport:
    return LayerReport(
        name=target.name,
        rank=target.rank,
        peft_scaling=target.peft_scaling,
        num_tokens=statistics.num_input_tokens,
        num_grad_tokens=statistics.num_output_tokens,
        input_damping=solution.input_damping,
        output_damping=solution.output_damping,
        eigenvalues=solution.eigenvalues.tolist(),
        displacement_norm=solution.displacement_norm,
        solver=solution.solver,
        residual=solution.residual,
        notes=list(solution.notes),
    )


def _solution_to(solution: LayerSolution, device: torch.device | str) -> LayerSolution:
    return dataclasses.replace(
        solution,
        basis_A=solution.basis_A.to(device),
        basis_B=solution.basis_B.to(device),
        eigenvalues=solution.eigenvalues.to(device),
    )
