"""`refit_init`: another initialisation from a stored one, offline: no data, and no model but for DoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from lora_da_hf.artifacts.adapter_config import alpha_divisor, expert_of
from lora_da_hf.artifacts.folders import check_replaceable
from lora_da_hf.artifacts.statistics_store import input_groups_of, iterate_statistics
from lora_da_hf.artifacts.store import StoredInit, load_init
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.pipeline.refit_write import Refit, write_refit
from lora_da_hf.pipeline.solve import reported
from lora_da_hf.pipeline.stored import Given, changed_settings, config_for_refit, gives_step, stored_step
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport
from lora_da_hf.setting_groups import SOLVE_SETTINGS
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.theory.layer_scales import divisors, step_unit
from lora_da_hf.theory.rank_budget import allocate_ranks, num_adapter_parameters
from lora_da_hf.theory.solve import solve_group


def refit_init(
    folder: str | Path,
    output_dir: str | Path,
    *,
    config: Given = None,
    rank: int | None = None,
    rank_budget: int | None = None,
    step_size: float | None = None,
    base_model: nn.Module | None = None,
    progress: bool = True,
) -> StoredInit:
    """Make another initialisation from a stored one: other ranks, or, from full statistics, other settings.

    The step is the one given; or, if the ranks or the settings are others, what the stored steps say for them
    (`lora_da_hf.pipeline.stored.stored_step`): nothing is measured here, and the report says so. All layers have one
    scaling. A rank changes it as it does in PEFT where `lora_alpha` stays, and the step makes up for that; under a rank
    budget it stays. Layers that PEFT initialised keep their tensors; all experts have one rank, so theirs is cut, or
    longer by what PEFT starts with.

    Args:
        folder: A stored initialisation.
        output_dir: Where the new one goes: all of it or nothing. An initialisation that is there is replaced.
        config: The settings to solve and write with: all of them as a config, or by name those that are not as stored.
            Those of the pass over the data stay. None: as stored.
        rank: Of every layer (of one with fewer directions, all of them); None: as stored.
        rank_budget: Parameters of all A and B together, shared out by `allocate_ranks`, instead of ``rank``.
        step_size: How far step 0 goes, whatever the config says.
        base_model: The base model. DoRA needs it, whose magnitudes follow from its weights; else it is only compared.
        progress: Whether to show a progress bar while layers are solved.

    Returns:
        The new initialisation, read back with every check. Statistics are taken along if ``config.save_statistics``;
        without a config they stay where they are, in ``folder`` itself too.

    Raises:
        ArtifactError: if the folder is damaged, or has no statistics and ``config`` needs them.
        ConfigError: if a rank is above the stored one, a budget too small, or ``config`` asks for another pass over
            data, or for other ``layer_steps`` without a step; if ``output_dir`` holds something else; if a DoRA adapter
            comes without its base, or experts would get different ranks.
        BaseModelMismatchError: if it was computed for another base.
        SolveError: if a layer cannot be solved with these settings.
    """
    check_replaceable(Path(output_dir))
    if rank is not None and (rank < 1 or rank_budget is not None):
        raise ConfigError(f"rank={rank}, rank_budget={rank_budget}: give a rank of at least 1, or a budget, not both.")
    stored = load_init(folder, base_model=None if base_model is None else base_model_facts(base_model))
    if stored.peft_config["use_dora"] and base_model is None:
        raise ConfigError(
            f"{folder} is a DoRA adapter, whose magnitudes follow from the base's weights. Give the base_model."
        )
    new = _new_config(stored, config, step_size, in_place=Path(folder).resolve() == Path(output_dir).resolve())
    changed = [name for name in changed_settings(new, stored.manifest.config) if name in SOLVE_SETTINGS]
    bases, layers, unit = stored.bases, stored.manifest.layers, stored.report.step_unit
    notes: list[str] = []
    if changed:
        notes += _notes_on_step(stored, new, config, changed, step_size)
        bases, layers, unit = _solve_again(stored, new, progress=progress)
    ranks = {name: layer.rank for name, layer in layers.items()}
    if rank is not None:
        ranks = {name: _possible_rank(layer, rank) for name, layer in layers.items()}
    elif rank_budget is not None:
        ranks, note = _share_out(layers, rank_budget)
        notes.append(note)
    experts = [name for name in ranks if expert_of(name) is not None]
    found = {ranks[name] for name in experts}
    if len(found) > 1:
        raise ConfigError(
            f"The experts ({experts[0]} first) would get ranks {min(found)} to {max(found)}, and PEFT has one for all. "
            "Give a rank that each can have, and no budget."
        )
    step = None if new.step_size is None or new.searches_step else float(new.step_size)
    if new.searches_step:
        step, source = stored_step(stored.manifest, ranks)
        notes.append(source)
    scaling = next(iter(layers.values())).peft_scaling
    if rank is not None:
        before = max(layer.rank for layer in layers.values())
        scaling *= alpha_divisor(stored.peft_config, before) / alpha_divisor(stored.peft_config, max(ranks.values()))
    layers = {
        name: dataclasses.replace(layer, rank=ranks[name], peft_scaling=scaling) for name, layer in layers.items()
    }
    refit = Refit(
        stored=stored, config=new, changed=changed, bases=bases, layers=layers, step_unit=unit, step=step, notes=notes
    )
    write_refit(refit, Path(output_dir), base_model)
    return load_init(output_dir)


def _new_config(stored: StoredInit, given: Given, step_size: float | None, *, in_place: bool) -> LoRADAConfig:
    """Return the settings of the new initialisation; in its own folder it keeps the statistics, which would be lost."""
    config = config_for_refit(stored.manifest, given)
    has_statistics = bool(stored.manifest.statistics_files)
    drops = isinstance(given, Mapping) and given.get("save_statistics") is False
    if config.save_statistics and not has_statistics:
        raise ArtifactError(f"{stored.folder} has no statistics to take along. Leave save_statistics out.")
    keeps = config.save_statistics or (has_statistics and in_place and not drops)
    step = config.step_size if step_size is None else step_size
    return dataclasses.replace(config, save_statistics=keeps, step_size=step)


def _notes_on_step(
    stored: StoredInit, new: LoRADAConfig, given: Given, changed: list[str], step_size: float | None
) -> list[str]:
    """Note that the stored step was found with other settings, if it is used."""
    is_given = step_size is not None or (isinstance(given, Mapping) and gives_step(given))
    if is_given or new.step_size != stored.manifest.config.step_size:
        return []
    if "layer_steps" in changed and new.step_size is not None:
        raise ConfigError(
            "layer_steps changes how far the layers go beside each other, so the stored step means nothing. "
            "Give a step_size."
        )
    note = f"the step was searched before {', '.join(changed)} changed: apply_init searches it anew if given samples"
    return [note] if new.searches_step else []


def _solve_again(
    stored: StoredInit, config: LoRADAConfig, *, progress: bool
) -> tuple[dict[str, LayerSolution], dict[str, LayerReport], float]:
    """Solve every layer from its statistics, and return bases, reports and the unit of the step."""
    layers = dict(stored.manifest.layers)
    solutions: dict[str, LayerSolution] = {}
    ranks = {
        name: min(max(config.max_rank or layer.max_rank, layer.rank), layer.in_features)
        for name, layer in layers.items()
    }
    number = len(input_groups_of(stored.manifest))
    groups = iterate_statistics(stored.folder, stored.manifest)
    for statistics in tqdm(groups, desc="LoRA-DA solve", total=number, disable=not progress, leave=False):
        with full_precision("cpu"):
            solutions |= solve_group(statistics, config, ranks=ranks, population_size=stored.report.population_size)
        layers |= {name: dataclasses.replace(layers[name], **reported(solutions[name])) for name in statistics}
    unit = step_unit(layers.values(), layer_steps=config.layer_steps)
    by_layer = divisors(layers.values(), unit, layer_steps=config.layer_steps)
    scaled = {name: solutions[name].in_unit(by_layer[name]) for name in layers}
    return scaled, {n: dataclasses.replace(layers[n], **reported(solution)) for n, solution in scaled.items()}, unit


def _possible_rank(layer: LayerReport, rank: int) -> int:
    """Return a rank that a layer can have: the one asked for, or all directions that it has."""
    if rank <= layer.max_rank or layer.max_rank == layer.in_features:
        return min(rank, layer.max_rank)
    raise ConfigError(
        f"{layer.name}: rank {rank} is above the stored {layer.max_rank}. Ask for a smaller one; or, if the full "
        f"statistics are stored, give a config with max_rank={rank} (--da_max_rank {rank})."
    )


def _share_out(layers: Mapping[str, LayerReport], budget: int) -> tuple[dict[str, int], str]:
    """Choose the rank of each layer under a budget, and say what was spent."""
    widths = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    ranks = allocate_ranks({name: layer.eigenvalues for name, layer in layers.items()}, widths, budget)
    spent = num_adapter_parameters(ranks, widths)
    lowest, highest = min(ranks.values()), max(ranks.values())
    return ranks, f"ranks {lowest} to {highest}, which take {spent} of {budget} parameters"
