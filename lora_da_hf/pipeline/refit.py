"""`refit_init`: another initialisation from a stored one, offline: without data or a model."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from lora_da_hf.artifacts.adapter_config import alpha_divisor, config_for, expert_of
from lora_da_hf.artifacts.folders import check_replaceable
from lora_da_hf.artifacts.leading import read_leading, save_leading
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, RefittedFrom
from lora_da_hf.artifacts.store import StoredInit, load_init, write_init
from lora_da_hf.artifacts.tensors import factor_key, input_groups_of, iterate_statistics, read_tensors, stored_factor
from lora_da_hf.config import SOLVE_SETTINGS, LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.pipeline.solve import reported
from lora_da_hf.pipeline.stored import Given, changed_settings, config_for_refit, gives_step, stored_step
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.theory.solve import INPUTS_HAVE_NO_STEP, factorize, solve_layer, solve_other_starts
from lora_da_hf.theory.steps import factors_at_step, in_one_unit, paper_step_size, product_norm, rounding_notes


def refit_init(
    folder: str | Path,
    output_dir: str | Path,
    *,
    config: Given = None,
    rank: int | None = None,
    step_size: float | None = None,
    progress: bool = True,
) -> StoredInit:
    """Make another initialisation from a stored one: other ranks, or, from full statistics, other settings.

    Nothing is measured. All layers have one scaling. A new rank changes it as in PEFT, since `lora_alpha` stays.
    Layers that PEFT initialised keep their tensors, and experts their rank.

    Args:
        folder: A stored initialisation.
        output_dir: Where the new one goes: all of it or nothing. An initialisation that is there is replaced.
        config: The settings to solve and write with: all of them as a config, or by name those that are not as stored.
            Those of the pass over the data stay.
        rank: Of every layer (of one with fewer directions, all of them); None: as stored.
        step_size: How far step 0 goes; None: what the config or the stored steps say.
        progress: Whether to show a progress bar while layers are solved.

    Returns:
        The new initialisation, read back with every check. Statistics are taken along if ``config.save_statistics``,
        and stay in ``folder`` itself unless that is False by name.

    Raises:
        ArtifactError: if the folder is damaged, or has no statistics and ``config`` needs them.
        ConfigError: if a rank or a setting cannot be had offline, as nothing of a DoRA adapter can; if
            ``output_dir`` holds something else.
        SolveError: if a layer cannot be solved with these settings.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    check_replaceable(output_dir)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank}: give a rank of at least 1.")
    stored = load_init(folder)
    if stored.peft_config["use_dora"]:
        raise ConfigError(
            f"{folder} is a DoRA adapter, whose magnitudes follow from the base's weights. Start from it at another "
            "rank with apply_init."
        )
    new = _new_config(stored, config, step_size, in_place=folder.resolve() == output_dir.resolve())
    manifest = stored.manifest
    changed = [name for name in changed_settings(new, manifest.config) if name in SOLVE_SETTINGS]
    bases, layers, unit = stored.bases, manifest.layers, stored.report.step_unit
    if changed == ["start"] and manifest.leading_files:
        bases, layers, unit = _in_one_unit(read_leading(folder, manifest, new.start), layers, new)
    elif changed:
        bases, layers, unit = _solve_again(stored, new, progress=progress)
    ranks, notes = _new_ranks(layers, rank), [INPUTS_HAVE_NO_STEP] if new.start == "inputs" else list[str]()
    step = 0.0 if new.start == "inputs" else new.step_size
    if new.searches_step:
        scaled = "start" in changed
        step, source = _step_of_stored_size(stored, bases, ranks) if scaled else stored_step(manifest, ranks, changed)
        notes.append(source)
    assert step != "line_search"
    scaling = next(iter(layers.values())).peft_scaling
    if rank is not None:
        before = max(layer.rank for layer in layers.values())
        scaling *= alpha_divisor(stored.peft_config, before) / alpha_divisor(stored.peft_config, max(ranks.values()))
    length = paper_step_size(scaling, new.stable_gamma) if step is None else step
    norms = {name: length * product_norm(*bases[name].at_rank(rank)) for name, rank in ranks.items()}
    new_layers = [
        dataclasses.replace(layer, rank=ranks[name], peft_scaling=scaling, update_norm=norms[name])
        for name, layer in layers.items()
    ]
    report = _new_report(stored.report, new, new_layers, step_unit=unit, step_size=step, notes=notes)
    since = (manifest.refitted_from.changed if manifest.refitted_from else {}) | {n: report.config[n] for n in changed}
    of_peft = config_for(stored.peft_config, {layer.name: layer for layer in new_layers}, stored.report.kept)
    with tempfile.TemporaryDirectory(prefix=f"_{output_dir.name}.", dir=output_dir.resolve().parent) as beside:
        write_init(
            output_dir,
            bases=bases,
            report=report,
            base_model=manifest.base_model,
            adapter=(_new_tensors(stored, report, new, bases), of_peft),
            statistics=_statistics(stored, report, new, Path(beside)),
            refitted_from=RefittedFrom(manifest=manifest.digest, changed=since),
        )
    return load_init(output_dir)


def _new_config(stored: StoredInit, given: Given, step_size: float | None, *, in_place: bool) -> LoRADAConfig:
    """Return the settings of the new initialisation; in its own folder it keeps the statistics, which would be lost."""
    config, before = config_for_refit(stored.manifest, given), stored.manifest.config
    is_full, is_leading = bool(stored.manifest.statistics_files), bool(stored.manifest.leading_files)
    if config.save_statistics and not (is_full or (is_leading and config.save_statistics == "leading")):
        raise ArtifactError(f"{stored.folder} has no statistics to take along. Leave save_statistics out.")
    by_name: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    keeps = config.save_statistics
    if in_place and by_name.get("save_statistics", True):
        keeps = keeps or is_full or ("leading" if is_leading else False)
    if keeps == "leading" and not is_full and config.start != before.start:
        raise ConfigError(
            f"{stored.folder} has the directions of the other starts, and those of {before.start} would be lost. Write "
            "to another folder, without save_statistics."
        )
    step = config.step_size if step_size is None else step_size
    new = dataclasses.replace(config, save_statistics=keeps, step_size=step)
    is_given = step_size is not None or gives_step(by_name) or new.step_size != before.step_size
    has_other_unit = new.layer_steps != before.layer_steps and new.step_size is not None
    has_other_unit |= new.start not in (before.start, "inputs") and not new.searches_step
    if has_other_unit and not is_given:
        raise ConfigError(
            "start and layer_steps change how far the layers go, so the stored step means nothing. Give a step_size."
        )
    return new


def _step_of_stored_size(
    stored: StoredInit, bases: Mapping[str, LayerSolution], ranks: Mapping[str, int]
) -> tuple[float, str]:
    """Return the step at which all layers together move as far as they did from the stored start, and say so."""
    moved = math.hypot(*(layer.update_norm for layer in stored.report.layers))
    if not moved:
        raise ConfigError(f"{stored.folder} has no step that another start could go as far as. Give a step_size.")
    step = moved / math.hypot(*(product_norm(*bases[name].at_rank(rank)) for name, rank in ranks.items()))
    return step, f"step {step:.4g}, so that the update is as large as the stored one: search it anew on your data"


def _solve_again(
    stored: StoredInit, config: LoRADAConfig, *, progress: bool
) -> tuple[dict[str, LayerSolution], dict[str, LayerReport], float]:
    """Solve every layer from its statistics, and return bases, reports and the unit of the step."""
    layers = stored.manifest.layers
    solutions: dict[str, LayerSolution] = {}
    most = {name: max(config.max_rank or layer.max_rank, layer.rank) for name, layer in layers.items()}
    ranks = {name: min(most[name], layer.in_features) for name, layer in layers.items()}
    groups, number = iterate_statistics(stored.folder, stored.manifest), len(input_groups_of(stored.manifest))
    for statistics in tqdm(groups, desc="LoRA-DA solve", total=number, disable=not progress, leave=False):
        size, factorized = stored.report.population_size, None
        with full_precision("cpu"):
            for name, layer in statistics.items():
                factorized = factorized or factorize(layer, config, layer=name)
                options: dict[str, Any] = {"layer": name, "rank": ranks[name], "population_size": size}
                solutions[name] = solve_layer(layer, factorized, config, **options)
    return _in_one_unit(solutions, layers, config)


def _in_one_unit(
    solutions: Mapping[str, LayerSolution], layers: Mapping[str, LayerReport], config: LoRADAConfig
) -> tuple[dict[str, LayerSolution], dict[str, LayerReport], float]:
    layers = {name: dataclasses.replace(layers[name], **reported(one)) for name, one in solutions.items()}
    return in_one_unit(solutions, layers, layer_steps=config.lengths)


def _new_ranks(layers: Mapping[str, LayerReport], rank: int | None) -> dict[str, int]:
    """Choose the rank of each layer."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    if rank is not None:
        for layer in layers.values():
            if layer.max_rank < min(rank, layer.in_features):
                raise ConfigError(
                    f"{layer.name}: rank {rank} is above the stored {layer.max_rank}. Ask for a smaller one; or, if "
                    f"the full statistics are stored, give a config with max_rank={rank} (--da_max_rank {rank})."
                )
        ranks = {name: min(rank, layer.max_rank) for name, layer in layers.items()}
    changed = [name for name in ranks if expert_of(name) is not None and ranks[name] != layers[name].rank]
    if changed:
        raise ConfigError(
            f"{changed[0]}: experts keep the rank that they are stored at, since those that no token was routed to "
            "share it. Start from them at another rank with apply_init."
        )
    return ranks


def _new_report(
    stored: LoRADAReport, config: LoRADAConfig, layers: list[LayerReport], *, notes: list[str], **others: Any
) -> LoRADAReport:
    """Return the stored report with what changed; losses are left out, which nothing measured for this adapter."""
    largest = max(layer.max_rank for layer in layers)
    steps = stored.step_size_by_rank if config.searches_step and config.start == stored.config["start"] else {}
    losses = [f"{which}_loss_{when}" for which in ("search", "unseen") for when in ("before", "after")]
    return dataclasses.replace(
        stored,
        **others,
        **dict.fromkeys([*losses, "unseen_loss_error"]),
        layers=layers,
        step_size_by_rank={rank: step for rank, step in steps.items() if rank <= largest},
        search=[],
        num_unseen_samples=0,
        seconds={},
        plan="",
        config=config.to_dict(),
        notes=[
            *notes,
            *rounding_notes(layers, layer_steps=config.lengths),
            "refitted from a stored initialisation: no loss was measured with this adapter",
        ],
    )


def _statistics(stored: StoredInit, report: LoRADAReport, config: LoRADAConfig, folder: Path) -> list[Path]:
    """Return the files that are taken along: directions of the other starts are found from the full statistics."""
    manifest, asked = stored.manifest, config.save_statistics
    files = (manifest.leading_files if asked == "leading" else manifest.statistics_files) if asked else []
    if files or not asked:
        return [stored.folder / name for name in files]
    options: dict[str, Any] = {"ranks": {layer.name: layer.max_rank for layer in report.layers}}
    options["population_size"] = report.population_size
    found: dict[str, dict[str, LayerSolution]] = {}
    for statistics in iterate_statistics(stored.folder, stored.manifest):
        with full_precision("cpu"):
            found |= solve_other_starts(statistics, config, **options)
    save_leading(folder, found, part=0)
    return sorted(folder.iterdir())


def _new_tensors(
    stored: StoredInit, report: LoRADAReport, config: LoRADAConfig, bases: Mapping[str, LayerSolution]
) -> dict[str, Tensor]:
    """Return the stored adapter's tensors with the new factors in place of the old ones."""
    tensors = read_tensors(stored.folder / ADAPTER_FILE, None)
    for layer in report.layers:
        as_made = layer.rank == stored.manifest.layers[layer.name].rank and not config.keeps_a_without_step
        if report.step_size == 0 and as_made:
            continue  # A is as PEFT made it
        basis_A, basis_B = (part.double() for part in bases[layer.name].at_rank(layer.rank))
        values = factors_at_step(basis_A, basis_B, config, peft_scaling=layer.peft_scaling, step_size=report.step_size)
        for factor, value in zip("AB", values, strict=True):
            key = factor_key(layer.name, factor)
            place = stored_factor(tensors, layer.name, factor, layer.rank)
            if place is None or expert_of(layer.name) is None:
                tensors[key] = value.to(tensors[key].dtype).contiguous()
            else:
                place.copy_(value)
    return tensors
