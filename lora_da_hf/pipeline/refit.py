"""`refit_init`: another initialisation from a stored one, offline: no data, and no model but for DoRA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from lora_da_hf.artifacts.basis import StoredBasis
from lora_da_hf.artifacts.folders import check_replaceable, remove_leftovers
from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.peft_config import alpha_of, holder_of
from lora_da_hf.artifacts.statistics_store import input_groups_of, iterate_statistics, statistics_files
from lora_da_hf.artifacts.store import StoredInit, load_init
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.pipeline.against_base import check_against_base
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.pipeline.ranks_per_layer import alpha_for, share_out
from lora_da_hf.pipeline.refit_write import Refit, refitted_from, write_refit
from lora_da_hf.pipeline.solve import reported
from lora_da_hf.pipeline.stored import Given, changed_settings, config_for_refit, gives_step, population_of
from lora_da_hf.records import LayerSolution
from lora_da_hf.setting_groups import SOLVE_SETTINGS
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.theory.layer_scales import divisors, step_unit
from lora_da_hf.theory.solve import solve_group


def refit_init(
    folder: str | Path,
    output_dir: str | Path,
    *,
    config: LoRADAConfig | Mapping[str, Any] | None = None,
    rank: int | None = None,
    rank_budget: int | None = None,
    step_size: float | None = None,
    base_model: nn.Module | None = None,
    progress: bool = True,
) -> StoredInit:
    """Make another initialisation from a stored one: other ranks, or, from full statistics, other settings.

    The step is the one given; or, if the ranks or the settings are others, what the stored steps say for them
    (`lora_da_hf.pipeline.stored.stored_step`): nothing is measured here, and the report says so. `lora_alpha` stays, so
    a rank changes the scaling as it does in PEFT, and the step makes up for it. Only under a rank budget does each
    layer keep its scaling, by an alpha of its own. Layers that PEFT initialised keep their tensors, rank and scaling;
    but PEFT has one rank for all experts and other parameters, so theirs is cut, or longer by what PEFT starts with.

    Args:
        folder: A stored initialisation.
        output_dir: Where the new one goes: all of it or nothing. An initialisation that is there is replaced.
        config: The settings to solve and write with: all of them as a config, or by name those that are not as stored.
            Those of the pass over the data stay. None: as stored.
        rank: Of every layer (of one with fewer directions, all of them); None: as stored.
        rank_budget: Parameters of all A and B together, shared out by `allocate_ranks`; instead of ``rank``. None: the
            config's, if it is another than the stored one.
        step_size: How far step 0 goes, whatever the config says.
        base_model: The base model. DoRA needs it, whose magnitudes follow from its weights; else it is only compared.
        progress: Whether to show a progress bar while layers are solved.

    Returns:
        The new initialisation, read back with every check. Statistics are copied if ``config.save_statistics``;
        without a config they stay where they are, in ``folder`` itself too.

    Raises:
        ArtifactError: if the folder is damaged, or has no statistics and ``config`` needs them.
        ConfigError: if a rank is above the stored one, a budget too small, both are given, or ``config`` asks for
            another pass over data, or for other ``layer_steps`` without a step; if ``output_dir`` holds
            something else than an initialisation; if a DoRA adapter comes without
            its base, or experts would get different ranks.
        BaseModelMismatchError: if it was computed for another base.
        SolveError: if a layer cannot be solved with these settings.
    """
    check_replaceable(Path(output_dir))
    remove_leftovers(Path(output_dir))
    refit = _read(Path(folder), config, step_size, base_model)
    stored_config = refit.manifest.config
    if rank_budget is None and refit.config.rank_budget != stored_config.rank_budget:
        rank_budget = refit.config.rank_budget
    if rank is not None and (rank < 1 or rank_budget is not None):
        raise ConfigError(f"rank={rank}, rank_budget={rank_budget}: give a rank of at least 1, or a budget, not both.")
    drops = isinstance(config, Mapping) and config.get("save_statistics") is False
    if not drops and Path(folder).resolve() == Path(output_dir).resolve():
        kept = bool(statistics_files(refit.manifest))  # they would be lost
        refit.config = dataclasses.replace(refit.config, save_statistics=kept or refit.config.save_statistics)
    if rank is not None or rank_budget is not None:
        refit.config = dataclasses.replace(refit.config, rank_budget=rank_budget)
    solved_with = [name for name in changed_settings(refit.config, stored_config) if name in SOLVE_SETTINGS]
    if refit.config.save_statistics and not statistics_files(refit.manifest):
        raise ArtifactError(f"{folder} has no statistics to take along. Leave save_statistics out.")
    if solved_with:
        is_given = step_size is not None or (isinstance(config, Mapping) and gives_step(config))
        if not is_given and refit.config.step_size == stored_config.step_size:
            _note_carried_step(refit, solved_with)
        _solve_again(refit, progress=progress)
    if rank is not None:
        refit.ranks = {name: _possible_rank(refit, name, rank) for name in refit.bases}
    elif rank_budget is not None:
        _spend(refit, rank_budget)
    _check_experts(refit)
    return write_refit(refit, Path(output_dir), solved_with)


def is_cut(folder: Path, manifest: Manifest, *, rank: int) -> bool:
    """Tell whether a folder holds what `refit_init` made for a rank alone, and every byte of it is still the same.

    Args:
        folder: Where it would be.
        manifest: Of the initialisation that it would have been made from.
        rank: That was asked for.
    """
    try:
        found = load_init(folder).manifest
    except ArtifactError:
        return False
    ranks = {name: min(rank, layer.max_rank) for name, layer in manifest.layers.items()}
    return was_cut(found, manifest) and {name: layer.rank for name, layer in found.layers.items()} == ranks


def was_cut(found: Manifest, manifest: Manifest) -> bool:
    """Tell whether `refit_init` made one initialisation of another for a rank alone, whatever rank.

    Args:
        found: The manifest of the one.
        manifest: That of the other.
    """
    config = dataclasses.replace(config_for_refit(manifest, None), rank_budget=None)
    return found.refitted_from == refitted_from(manifest) and found.config == config


def _read(folder: Path, config: Given, step_size: float | None, base_model: nn.Module | None) -> Refit:
    stored = load_init(folder, base_model=None if base_model is None else base_model_facts(base_model))
    notes = [] if base_model is None else list(check_against_base(stored, base_model))
    new = config_for_refit(stored.manifest, config)
    if step_size is not None:
        new = dataclasses.replace(new, step_size=step_size)
    peft_config = stored.peft_config
    if peft_config.get("use_dora") and base_model is None:
        raise ConfigError(
            f"{folder} is a DoRA adapter, whose magnitudes follow from the base's weights. Give the base_model."
        )
    refit = Refit(
        stored=stored,
        config=new,
        peft_config=peft_config,
        bases=dict(stored.bases),
        reports={layer.name: layer for layer in stored.report.layers},
        step_unit=stored.report.step_unit,
        ranks={name: layer.rank for name, layer in stored.manifest.layers.items()},
        alphas={name: alpha_of(peft_config, holder_of(name)) for name in stored.manifest.layers},
        notes=notes,
        base=base_model,
    )
    for name, layer in stored.manifest.layers.items():
        if not math.isclose(refit.scaling(name), layer.peft_scaling, rel_tol=1e-9):  # else load_init refuses it
            raise ConfigError(f"{folder}: its experts have ranks or alphas of their own. Use apply_init.")
    return refit


def _note_carried_step(refit: Refit, solved_with: list[str]) -> None:
    """Note that the stored step was found with other settings.

    Raises:
        ConfigError: if it was found for other lengths of the layers.
    """
    if "layer_steps" in solved_with and refit.config.step_size is not None:
        raise ConfigError(
            "layer_steps changes how far the layers go beside each other, so the stored step means nothing. "
            "Give a step_size."
        )
    if refit.config.searches_step:
        refit.notes.append(
            f"the step was searched before {', '.join(solved_with)} changed: apply_init searches it anew if given "
            "samples"
        )


def _solve_again(refit: Refit, *, progress: bool) -> None:
    """Solve every layer from its statistics with the new settings."""
    population_size = population_of(refit.manifest, refit.config)
    solutions: dict[str, LayerSolution] = {}
    groups = iterate_statistics(refit.stored.folder, refit.manifest)
    number = len(input_groups_of(refit.manifest))
    ranks = {
        name: min(max(refit.config.max_rank or layer.max_rank, layer.rank), layer.in_features)
        for name, layer in refit.manifest.layers.items()
    }
    for statistics in tqdm(groups, desc="LoRA-DA solve", total=number, disable=not progress, leave=False):
        with full_precision("cpu"):
            solutions |= solve_group(statistics, refit.config, ranks=ranks, population_size=population_size)
        refit.reports |= {n: dataclasses.replace(refit.reports[n], **reported(solutions[n])) for n in statistics}
    layers, layer_steps = refit.reports.values(), refit.config.layer_steps
    refit.step_unit = step_unit(layers, layer_steps=layer_steps)
    by_layer = divisors(layers, refit.step_unit, layer_steps=layer_steps)
    for name, solved in solutions.items():
        solution = solved.in_unit(by_layer[name])
        refit.bases[name] = StoredBasis.of(solution)
        refit.reports[name] = dataclasses.replace(refit.reports[name], **reported(solution))


def _possible_rank(refit: Refit, name: str, rank: int) -> int:
    """Return a rank that a layer can have: the one asked for, or all directions that it has.

    Raises:
        ConfigError: if more are asked for than were solved.
    """
    solved, d_in = refit.bases[name].basis_A.shape
    if rank <= solved or solved == d_in:
        return min(rank, solved)
    raise ConfigError(
        f"{name}: rank {rank} is above the stored {solved}. Ask for a smaller one; or, if the full statistics are "
        f"stored, give a config with max_rank={rank} (--da_max_rank {rank})."
    )


def _spend(refit: Refit, budget: int) -> None:
    """Choose the ranks under a budget, each with an alpha that keeps the layer's scaling."""
    widths = {name: (layer.in_features, layer.out_features) for name, layer in refit.manifest.layers.items()}
    spectra = {name: report.eigenvalues for name, report in refit.reports.items()}
    scalings = {name: refit.scaling(name) for name in refit.ranks}
    refit.ranks, note = share_out(spectra, widths, budget)
    refit.alphas = {name: alpha_for(refit.peft_config, rank, scalings[name]) for name, rank in refit.ranks.items()}
    refit.notes.append(note)


def _check_experts(refit: Refit) -> None:
    """Verify that all experts have one rank and alpha, as PEFT has it.

    Raises:
        ConfigError: if not.
    """
    experts = [name for name in refit.ranks if holder_of(name) != name]
    ranks = {refit.ranks[name] for name in experts}
    if len(ranks) > 1 or any(refit.alphas[name] != refit.peft_config["lora_alpha"] for name in experts):
        raise ConfigError(
            f"The experts ({experts[0]} first) would get ranks {min(ranks)} to {max(ranks)} or an alpha of their own, "
            "and PEFT has one of each for all. Give a rank that each can have, and no budget."
        )
