"""`refit_init`: another initialisation from a stored one, offline: no data, and no model but for DoRA."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_da_hf.adapters.experts import resize_factors
from lora_da_hf.adapters.write import dora_magnitude
from lora_da_hf.artifacts.adapter_config import (
    PEFT_PREFIX,
    alpha_divisor,
    expert_of,
    holder_of,
    pattern_names,
    rank_of,
    with_ranks,
)
from lora_da_hf.artifacts.adapter_tensors import MAGNITUDE, factor_key, stored_factor
from lora_da_hf.artifacts.basis import StoredBasis
from lora_da_hf.artifacts.folders import adopt, check_replaceable
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE, ADAPTER_FILE, FileEntry, Manifest, RefittedFrom
from lora_da_hf.artifacts.statistics_store import input_groups_of, iterate_statistics, statistics_files
from lora_da_hf.artifacts.store import StoredInit, load_init, write_init
from lora_da_hf.artifacts.tensors import read_tensors, write_tensors
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.pipeline.base_model import base_model_facts, base_modules
from lora_da_hf.pipeline.save import made_now
from lora_da_hf.pipeline.solve import reported
from lora_da_hf.pipeline.stored import changed_settings, config_for_refit, gives_step, stored_step
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport
from lora_da_hf.setting_groups import SOLVE_SETTINGS
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.theory.adapter_factors import factors_at_step
from lora_da_hf.theory.layer_scales import divisors, rounding_notes, step_unit
from lora_da_hf.theory.rank_budget import allocate_ranks, num_adapter_parameters
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
    new = config_for_refit(stored.manifest, config)
    if step_size is not None:
        new = dataclasses.replace(new, step_size=step_size)
    drops = isinstance(config, Mapping) and config.get("save_statistics") is False
    if statistics_files(stored.manifest) and not drops and Path(folder).resolve() == Path(output_dir).resolve():
        new = dataclasses.replace(new, save_statistics=True)  # they would be lost
    if new.save_statistics and not statistics_files(stored.manifest):
        raise ArtifactError(f"{folder} has no statistics to take along. Leave save_statistics out.")
    changed = [name for name in changed_settings(new, stored.manifest.config) if name in SOLVE_SETTINGS]
    notes: list[str] = []
    if changed:
        is_given = step_size is not None or (isinstance(config, Mapping) and gives_step(config))
        if not is_given and new.step_size == stored.manifest.config.step_size:
            notes += _notes_on_step(new, changed)
    solution = _solve_again(stored, new, progress=progress) if changed else _Solution.of(stored)
    ranks = {name: layer.rank for name, layer in stored.manifest.layers.items()}
    if rank is not None:
        ranks = {name: _possible_rank(layer, rank) for name, layer in solution.layers.items()}
    elif rank_budget is not None:
        ranks, note = _share_out(solution.layers, rank_budget)
        notes.append(note)
    _check_experts(ranks)
    if new.searches_step:
        step, source = stored_step(stored.manifest, ranks)
        notes.append(source)
    else:
        step = None if new.step_size is None else float(new.step_size)
    scaling = next(iter(stored.manifest.layers.values())).peft_scaling
    if rank is not None:
        before = max(layer.rank for layer in stored.manifest.layers.values())
        divisor, other = (alpha_divisor(stored.peft_config, most) for most in (before, max(ranks.values())))
        scaling *= divisor / other
    layers = {
        name: dataclasses.replace(layer, rank=ranks[name], peft_scaling=scaling)
        for name, layer in solution.layers.items()
    }
    _write(
        stored, dataclasses.replace(solution, layers=layers), new, Path(output_dir), step, notes, changed, base_model
    )
    return load_init(output_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Solution:
    """Bases, reports of the layers, and what the displacements over tokens are divided by."""

    bases: dict[str, StoredBasis]
    layers: dict[str, LayerReport]
    step_unit: float

    @classmethod
    def of(cls, stored: StoredInit) -> _Solution:
        return cls(bases=stored.bases, layers=stored.manifest.layers, step_unit=stored.report.step_unit)


def _notes_on_step(config: LoRADAConfig, changed: list[str]) -> list[str]:
    """Note that the stored step was found with other settings.

    Raises:
        ConfigError: if it was found for other lengths of the layers.
    """
    if "layer_steps" in changed and config.step_size is not None:
        raise ConfigError(
            "layer_steps changes how far the layers go beside each other, so the stored step means nothing. "
            "Give a step_size."
        )
    if not config.searches_step:
        return []
    return [f"the step was searched before {', '.join(changed)} changed: apply_init searches it anew if given samples"]


def _solve_again(stored: StoredInit, config: LoRADAConfig, *, progress: bool) -> _Solution:
    """Solve every layer from its statistics with the new settings."""
    manifest = stored.manifest
    solutions: dict[str, LayerSolution] = {}
    layers = dict(manifest.layers)
    ranks = {
        name: min(max(config.max_rank or layer.max_rank, layer.rank), layer.in_features)
        for name, layer in manifest.layers.items()
    }
    number = len(input_groups_of(manifest))
    groups = iterate_statistics(stored.folder, manifest)
    for statistics in tqdm(groups, desc="LoRA-DA solve", total=number, disable=not progress, leave=False):
        with full_precision("cpu"):
            solutions |= solve_group(statistics, config, ranks=ranks, population_size=stored.report.population_size)
        layers |= {name: dataclasses.replace(layers[name], **reported(solutions[name])) for name in statistics}
    unit = step_unit(layers.values(), layer_steps=config.layer_steps)
    by_layer = divisors(layers.values(), unit, layer_steps=config.layer_steps)
    scaled = {name: solutions[name].in_unit(by_layer[name]) for name in layers}
    return _Solution(
        bases={name: StoredBasis.of(solution) for name, solution in scaled.items()},
        layers={name: dataclasses.replace(layers[name], **reported(solution)) for name, solution in scaled.items()},
        step_unit=unit,
    )


def _possible_rank(layer: LayerReport, rank: int) -> int:
    """Return a rank that a layer can have: the one asked for, or all directions that it has.

    Raises:
        ConfigError: if more are asked for than were solved.
    """
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


def _check_experts(ranks: Mapping[str, int]) -> None:
    """Verify that all experts have one rank, as PEFT has it.

    Raises:
        ConfigError: if not.
    """
    experts = [name for name in ranks if expert_of(name) is not None]
    found = {ranks[name] for name in experts}
    if len(found) > 1:
        raise ConfigError(
            f"The experts ({experts[0]} first) would get ranks {min(found)} to {max(found)}, and PEFT has one for all. "
            "Give a rank that each can have, and no budget."
        )


def _write(
    stored: StoredInit,
    solution: _Solution,
    config: LoRADAConfig,
    output_dir: Path,
    step: float | None,
    notes: list[str],
    changed: list[str],
    base_model: nn.Module | None,
) -> None:
    """Write the new initialisation; losses are left out, which nothing measured for this adapter."""
    old, layers = stored.report, list(solution.layers.values())
    before = stored.manifest.refitted_from.changed if stored.manifest.refitted_from else {}
    largest = max(layer.max_rank for layer in layers)
    peft_config = _new_peft_config(stored, solution.layers)
    tensors = _new_tensors(stored, solution, peft_config, config, step, base_model)
    report = dataclasses.replace(
        old,
        layers=[solution.layers[layer.name] for layer in old.layers],
        step_unit=solution.step_unit,
        step_size=step,
        step_size_by_rank={r: s for r, s in old.step_size_by_rank.items() if config.searches_step and r <= largest},
        search=[],
        search_loss_before=None,
        search_loss_after=None,
        unseen_loss_before=None,
        unseen_loss_after=None,
        num_unseen_samples=0,
        seconds={},
        plan="",
        config=config.to_dict(),
        notes=[
            *notes,
            *rounding_notes(layers, layer_steps=config.layer_steps),
            "refitted from a stored initialisation: no loss was measured with this adapter",
        ],
    )

    def save_adapter(path: Path) -> None:
        write_tensors(path / ADAPTER_FILE, tensors)
        (path / ADAPTER_CONFIG_FILE).write_text(json.dumps(peft_config, indent=2, sort_keys=True), encoding="utf-8")

    def take_statistics(path: Path) -> None:
        for name in statistics_files(stored.manifest):
            adopt((stored.folder / name).resolve(), path / name)

    def make_manifest(files: dict[str, FileEntry]) -> Manifest:
        origin = RefittedFrom(
            manifest=stored.manifest.digest, changed={**before, **{name: getattr(config, name) for name in changed}}
        )
        base = stored.manifest.base_model
        return Manifest(**made_now(), base_model=base, refitted_from=origin, files=files, report=report)

    write_init(
        output_dir,
        bases=solution.bases,
        save_adapter=save_adapter,
        save_statistics=take_statistics if config.save_statistics else None,
        make_manifest=make_manifest,
    )


def _new_peft_config(stored: StoredInit, layers: Mapping[str, LayerReport]) -> dict[str, Any]:
    """Return PEFT's configuration for the new ranks; what PEFT initialised keeps its own, at the common scaling.

    Parameters get that of the experts: PEFT warns of patterns for them.
    """
    names = pattern_names(stored.peft_config, (*stored.report.kept, *layers))
    of_experts = next((layer.rank for name, layer in layers.items() if expert_of(name) is not None), None)
    ranks = {
        key: rank_of(stored.peft_config, key) if key == name or of_experts is None else of_experts
        for name in stored.report.kept
        for key in names[name]
    }
    ranks |= {key: layer.rank for name, layer in layers.items() for key in names[name]}
    return with_ranks(stored.peft_config, ranks, next(iter(layers.values())).peft_scaling)


def _new_tensors(
    stored: StoredInit,
    solution: _Solution,
    peft_config: dict[str, Any],
    config: LoRADAConfig,
    step: float | None,
    base_model: nn.Module | None,
) -> dict[str, Tensor]:
    """Return the stored adapter's tensors with the new factors in place of the old ones, in their dtype."""
    tensors = read_tensors(stored.folder / ADAPTER_FILE, None)
    holders = {holder_of(name) for name in (*solution.layers, *stored.report.kept)}
    for name, keys in pattern_names(peft_config, sorted(holders)).items():
        if not keys or keys == [name]:
            continue
        old, new = (rank_of(each, keys[0]) for each in (stored.peft_config, peft_config))
        if old != new:
            both = [factor_key(name, factor) for factor in ("A", "B")]
            resized = resize_factors(*(tensors[key] for key in both), old=old, new=new, seed=stored.report.seed)
            tensors.update(zip(both, resized, strict=True))
    modules = {} if base_model is None else base_modules(base_model)
    for name, layer in solution.layers.items():
        basis = solution.bases[name]
        factors = factors_at_step(
            basis.basis_A[: layer.rank].double(),
            basis.basis_B[:, : layer.rank].double(),
            config,
            peft_scaling=layer.peft_scaling,
            step_size=step,
        )
        for factor, value in zip(("A", "B"), factors, strict=True):
            key = factor_key(name, factor)
            if expert_of(name) is None:
                tensors[key] = value.to(tensors[key].dtype).contiguous()
            else:
                place = stored_factor(tensors, name, factor, layer.rank)
                assert place is not None  # load_init has looked
                place.copy_(value)
        lora_A, lora_B = (stored_factor(tensors, name, factor, layer.rank) for factor in ("A", "B"))
        assert lora_A is not None and lora_B is not None
        if peft_config["use_dora"]:
            key = f"{PEFT_PREFIX}{name}{MAGNITUDE}"
            magnitude = dora_magnitude(modules[name], lora_A, lora_B, layer.peft_scaling)
            tensors[key] = magnitude.to(tensors[key]).reshape(tensors[key].shape)
        layer.update_norm = layer.peft_scaling * (factors[1] @ factors[0]).norm().item()
    return tensors
