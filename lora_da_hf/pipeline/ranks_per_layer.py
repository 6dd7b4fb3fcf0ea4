"""Ranks per layer under a budget, for an adapter at hand or a stored one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_da_hf.adapters.resizing import layers_in_patterns, put_in, trained_factors, with_rank
from lora_da_hf.adapters.targets import Target, find_targets
from lora_da_hf.artifacts.peft_config import (
    alpha_divisor,
    alpha_of,
    check_patterns,
    rank_of,
    read_of_checkpoint,
    with_ranks,
)
from lora_da_hf.errors import TargetError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.records import LayerSolution
from lora_da_hf.theory.rank_budget import allocate_ranks, num_adapter_parameters


def share_out(
    eigenvalues: Mapping[str, Sequence[float]], widths: Mapping[str, tuple[int, int]], budget: int
) -> tuple[dict[str, int], str]:
    """Choose the rank of each layer under a budget, as `allocate_ranks` does, and say what was spent.

    Raises:
        ConfigError: if the budget does not buy rank 1 for each.
    """
    ranks = allocate_ranks(eigenvalues, widths, budget)
    spent = num_adapter_parameters(ranks, widths)
    note = f"ranks {min(ranks.values())} to {max(ranks.values())}, which take {spent} of {budget} parameters"
    return ranks, note


def alpha_for(peft_config: Mapping[str, Any], rank: int, scaling: float) -> float:
    """Return PEFT's alpha that gives a layer of this rank a scaling: an integer, as PEFT has it, but for rounding."""
    alpha = scaling * alpha_divisor(peft_config, rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def spend_budget(job: Job, solutions: Mapping[str, LayerSolution]) -> None:
    """Give the layers the ranks that the config's budget buys, if there is one; each keeps its scaling.

    Layers that keep PEFT's own initialisation keep their rank, and count for nothing.

    Raises:
        ConfigError: if the budget does not buy rank 1 for each.
    """
    if job.config.rank_budget is None:
        return
    widths = {name: (job.targets[name].in_features, job.targets[name].out_features) for name in solutions}
    spectra = {name: solution.eigenvalues.tolist() for name, solution in solutions.items()}
    ranks, note = share_out(spectra, widths, job.config.rank_budget)
    job.report.notes.append(note)
    give_ranks(job, ranks)


def give_ranks(job: Job, ranks: Mapping[str, int]) -> None:
    """Give layers other ranks at the scaling that they have, in the model, its PEFT config, the job and its report."""
    if all(job.targets[name].rank == rank for name, rank in ranks.items()):
        return
    config = peft_config_of(job.model, job.scan.adapter_name)
    values = config.to_dict()
    scalings = {name: job.targets[name].peft_scaling for name in ranks}
    alphas = {name: alpha_for(values, rank, scalings[name]) for name, rank in ranks.items()}
    job.undo.append(_undo(job, config, values))
    job.targets = {**job.targets, **_resized(job.targets, values, ranks, alphas, job.trained)}
    job.scan = dataclasses.replace(job.scan, targets=list(job.targets.values()))
    adapter = job.scan.adapter_name
    layers = layers_in_patterns(job.model, adapter)
    kept = {name: (layer.r[adapter], layer.lora_alpha[adapter]) for name, layer in layers.items() if name not in ranks}
    _set_patterns(config, with_ranks(values, ranks, alphas, kept))
    for layer in job.report.layers:
        layer.rank, layer.peft_scaling = job.targets[layer.name].rank, job.targets[layer.name].peft_scaling


def _undo(job: Job, config: Any, values: Mapping[str, Any]) -> Callable[[], None]:
    before = job.targets
    alphas = {name: target.layer.lora_alpha[target.adapter_name] for name, target in before.items()}

    def undo() -> None:
        for name, target in before.items():
            put_in(target, alpha=alphas[name])
        _set_patterns(config, values)
        job.targets = before

    return undo


def _resized(
    targets: Mapping[str, Target],
    peft_config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    trained: Mapping[str, tuple[bool, bool]],
) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for name, rank in ranks.items():
        if targets[name].rank != rank:
            scaling = alphas[name] / alpha_divisor(peft_config, rank)
            found[name] = with_rank(targets[name], rank, peft_scaling=scaling, trained=trained[name])
            put_in(found[name], alpha=alphas[name])
    return found


def adopt_ranks(model: nn.Module, adapter_name: str | None, peft_config_file: Path) -> None:
    """Give an adapter the ranks that a checkpoint of the same layers has, so that its weights can be loaded.

    Raises:
        ArtifactError: if the checkpoint has ranks or alphas that are neither the adapter's nor by the name of layers.
    """
    scan = find_targets(model, adapter_name)
    config = peft_config_of(model, scan.adapter_name)
    stored = read_of_checkpoint(peft_config_file)
    if all(stored[name] == getattr(config, name) for name in PATTERNS):
        return  # the user's own patterns, where the budget gave every layer the rank that it had
    check_patterns(peft_config_file, stored)
    targets = {target.name: target for target in scan.targets}
    ranks = {name: rank_of(stored, name) for name in targets}
    alphas = {name: alpha_of(stored, name) for name in targets}
    trained = {name: trained_factors(target) for name, target in targets.items()}
    _resized(targets, stored, ranks, alphas, trained)
    _set_patterns(config, stored)


def peft_config_of(model: nn.Module, adapter_name: str) -> Any:
    """Return PEFT's config of an adapter.

    Raises:
        TargetError: if the model has none.
    """
    configs: Any = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise TargetError(
            f"A {type(model).__name__} has no PEFT config of {adapter_name!r} to note ranks in. Wrap the model with "
            "get_peft_model."
        )
    return configs[adapter_name]


def _set_patterns(config: Any, values: Mapping[str, Any]) -> None:
    for name in PATTERNS:
        setattr(config, name, values[name])


PATTERNS = ("r", "rank_pattern", "alpha_pattern")
"""The settings of PEFT's config that say ranks and scalings, beside the default of alpha."""
