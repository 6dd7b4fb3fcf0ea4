"""`refit_init`: another initialisation from a stored one, offline: no model, no data."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.peft_config import alpha_divisor, alpha_of, read_peft_config, with_ranks
from lora_da_hf.artifacts.schema import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    IDENTITY,
    REPORT_FILE,
    FileEntry,
    LayerEntry,
    Manifest,
)
from lora_da_hf.artifacts.statistics_store import load_statistics, statistics_files
from lora_da_hf.artifacts.store import StoredBasis, StoredInit, load_init, read_tensors, write_init
from lora_da_hf.artifacts.stored_report import read_report
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.pipeline.ranks_per_layer import alpha_for, share_out
from lora_da_hf.pipeline.save import package_versions
from lora_da_hf.pipeline.stored import (
    SOLVE_SETTINGS,
    SOLVED_AGAIN_WITH,
    changed_settings,
    config_for_refit,
    manifest_digest,
    population_of,
    solved_again_with,
    steps_by_rank,
    stored_step,
)
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.theory.adapter_factors import factors_at_step
from lora_da_hf.theory.solve import factorize, solve_layer


@dataclasses.dataclass(kw_only=True)
class _Refit:
    """A stored initialisation on its way to another one.

    Attributes:
        stored: What it comes from.
        config: The new settings.
        peft_config: PEFT's, for the stored ranks.
        bases: By layer, stored or solved anew.
        reports: By layer.
        ranks: By layer.
        alphas: PEFT's, by layer.
        notes: What a user should know.
    """

    stored: StoredInit
    config: LoRADAConfig
    peft_config: dict[str, Any]
    bases: dict[str, StoredBasis]
    reports: dict[str, LayerReport]
    ranks: dict[str, int]
    alphas: dict[str, float]
    notes: list[str]

    @property
    def manifest(self) -> Manifest:
        """The manifest that it comes from."""
        return self.stored.manifest

    def scaling(self, name: str) -> float:
        """What PEFT multiplies ``B A`` with in a layer."""
        return self.alphas[name] / alpha_divisor(self.peft_config, self.ranks[name])


def refit_init(
    folder: str | Path,
    output_dir: str | Path,
    *,
    config: LoRADAConfig | None = None,
    rank: int | None = None,
    rank_budget: int | None = None,
    step_size: float | None = None,
) -> StoredInit:
    """Make another initialisation from a stored one: other ranks, or, from full statistics, other settings.

    The step is the one given; or, if the ranks or the settings are others, what the stored steps say for them
    (`lora_da_hf.pipeline.stored.stored_step`): nothing is measured here, and the report says so. `lora_alpha` stays, so
    a rank changes the scaling as it does in PEFT, and the step makes up for it. Only under a rank budget does each
    layer keep its scaling, by an alpha of its own. Layers that PEFT initialised keep their tensors, rank and scaling.

    Args:
        folder: A stored initialisation.
        output_dir: Where the new one goes: all of it or nothing. What is there is replaced.
        config: The settings to solve and write with; those of the pass over the data stay as stored. None: as stored.
        rank: Of every layer (of one with fewer directions, all of them); None: as stored.
        rank_budget: Parameters of all A and B together, shared out by `allocate_ranks`; instead of ``rank``. None: the
            config's, if it is another than the stored one.
        step_size: How far step 0 goes, whatever the config says.

    Returns:
        The new initialisation, read back with every check. Statistics are copied if ``config.save_statistics``, and
        stay where they are without a config.

    Raises:
        ArtifactError: if the folder is damaged, or has no statistics and ``config`` needs them.
        ConfigError: if a rank is above the stored one, a budget too small, both are given, or ``config`` asks for
            another pass over data, or for a displacement in other units without a step.
        SolveError: if a layer cannot be solved with these settings.
    """
    refit = _read(Path(folder), config, step_size)
    stored_config = LoRADAConfig.from_dict(refit.manifest.config)
    if rank_budget is None and refit.config.rank_budget != stored_config.rank_budget:
        rank_budget = refit.config.rank_budget
    if rank is not None and (rank < 1 or rank_budget is not None):
        raise ConfigError(f"rank={rank}, rank_budget={rank_budget}: give a rank of at least 1, or a budget, not both.")
    if rank is not None or rank_budget is not None:
        refit.config = dataclasses.replace(refit.config, rank_budget=rank_budget)
    solved_with = [name for name in changed_settings(refit.config, stored_config) if name in SOLVE_SETTINGS]
    if refit.config.save_statistics and not statistics_files(refit.manifest):
        raise ArtifactError(f"{folder} has no statistics to take along. Leave save_statistics out.")
    if solved_with:
        if step_size is None and refit.config.step_size == stored_config.step_size:
            _note_carried_step(refit, solved_with)
        _solve_again(refit)
    if rank is not None:
        refit.ranks = {name: _possible_rank(refit, name, rank) for name in refit.bases}
    elif rank_budget is not None:
        _spend(refit, rank_budget)
    return _write(refit, Path(output_dir), solved_with)


def cut_init(folder: str | Path, output_dir: str | Path, *, rank: int) -> Path:
    """Write a stored initialisation anew with an adapter of another rank, up to the stored one.

    Returns:
        The new folder.

    Raises:
        ArtifactError: if the folder is damaged.
        ConfigError: if the rank is above the stored one.
    """
    return refit_init(folder, output_dir, rank=rank).folder


def _read(folder: Path, config: LoRADAConfig | None, step_size: float | None) -> _Refit:
    stored = load_init(folder)
    new = config_for_refit(stored.manifest, config)
    if step_size is not None:
        new = dataclasses.replace(new, step_size=step_size)
    peft_config = read_peft_config(folder / ADAPTER_CONFIG_FILE)
    _refuse_what_needs_the_base(folder, peft_config)
    refit = _Refit(
        stored=stored,
        config=new,
        peft_config=peft_config,
        bases=dict(stored.bases),
        reports={layer.name: layer for layer in read_report(stored.folder / REPORT_FILE).layers},
        ranks={name: layer.rank for name, layer in stored.manifest.layers.items()},
        alphas={name: alpha_of(peft_config, name) for name in stored.manifest.layers},
        notes=[],
    )
    for name, layer in stored.manifest.layers.items():
        if not math.isclose(refit.scaling(name), layer.peft_scaling, rel_tol=1e-9):
            raise ArtifactError(
                f"{folder / ADAPTER_CONFIG_FILE} gives {name} the scaling {refit.scaling(name):.6g}, and the manifest "
                f"{layer.peft_scaling:.6g}. Fetch it again."
            )
    return refit


def _refuse_what_needs_the_base(folder: Path, peft_config: dict[str, Any]) -> None:
    """Refuse adapters that cannot be rewritten offline.

    Raises:
        ConfigError: for DoRA, whose magnitude follows from the base's weights, and for experts and other parameters.
    """
    if peft_config.get("use_dora"):
        raise ConfigError(f"{folder} is a DoRA adapter, whose magnitude needs the base's weights. Use apply_init.")
    parameters = peft_config.get("target_parameters")
    if parameters:
        raise ConfigError(
            f"{folder} adapts parameters ({parameters[0]} first), and cannot be refitted. Use apply_init."
        )


def _note_carried_step(refit: _Refit, solved_with: list[str]) -> None:
    """Note that the stored step was found with other settings.

    Raises:
        ConfigError: if it was found in other units.
    """
    if "normalize_displacement" in solved_with and refit.config.step_size is not None:
        raise ConfigError(
            "normalize_displacement changes what a step is measured in, so the stored one means nothing. Give a "
            "step_size."
        )
    if refit.config.searches_step:
        refit.notes.append(
            f"the step was searched before {', '.join(solved_with)} changed: apply_init searches it anew if given "
            "samples"
        )


def _solve_again(refit: _Refit) -> None:
    """Solve every layer from its statistics with the new settings."""
    statistics = load_statistics(refit.stored.folder, refit.manifest)
    population_size = population_of(refit.manifest, refit.config)
    groups: dict[str, list[str]] = {}
    for name, layer in refit.manifest.layers.items():
        groups.setdefault(layer.shares_input_with, []).append(name)
    for leader, names in groups.items():
        factorized = factorize(statistics[names[0]], refit.config, layer=leader)
        for name in names:
            layer = refit.manifest.layers[name]
            solution = solve_layer(
                statistics[name],
                factorized,
                refit.config,
                layer=name,
                rank=min(max(refit.config.max_rank or layer.max_rank, layer.rank), layer.in_features),
                population_size=population_size,
            )
            refit.bases[name] = StoredBasis(
                basis_A=solution.basis_A, basis_B=solution.basis_B, eigenvalues=solution.eigenvalues
            )
            refit.reports[name] = dataclasses.replace(
                refit.reports[name],
                input_damping=solution.input_damping,
                output_damping=solution.output_damping,
                eigenvalues=solution.eigenvalues.tolist(),
                displacement_norm=solution.displacement_norm,
                solver=solution.solver,
                residual=solution.residual,
                notes=list(solution.notes),
            )


def _possible_rank(refit: _Refit, name: str, rank: int) -> int:
    """Return a rank that a layer can have: the one asked for, or all directions that it has.

    Raises:
        ConfigError: if more are asked for than were solved.
    """
    solved, d_in = refit.bases[name].basis_A.shape
    if rank <= solved or solved == d_in:
        return min(rank, solved)
    raise ConfigError(
        f"{name}: rank {rank} is above the stored {solved}. Ask for a smaller one; or, if the full statistics are "
        f"stored, give a config with max_rank={rank}."
    )


def _spend(refit: _Refit, budget: int) -> None:
    """Choose the ranks under a budget, each with an alpha that keeps the layer's scaling."""
    widths = {name: (layer.in_features, layer.out_features) for name, layer in refit.manifest.layers.items()}
    spectra = {name: basis.eigenvalues.tolist() for name, basis in refit.bases.items()}
    scalings = {name: refit.scaling(name) for name in refit.ranks}
    shares = share_out(spectra, widths, budget)
    refit.ranks = shares.ranks
    refit.alphas = {name: alpha_for(refit.peft_config, rank, scalings[name]) for name, rank in refit.ranks.items()}
    refit.notes.append(shares.note)


def _write(refit: _Refit, output_dir: Path, solved_with: list[str]) -> StoredInit:
    if refit.config.searches_step:
        step, source = stored_step(refit.manifest, refit.ranks)
        refit.notes.append(source)
    else:
        step = None if refit.config.step_size is None else float(refit.config.step_size)
    peft_config, layers = refit.peft_config, refit.manifest.layers
    if any(layers[name].rank != rank for name, rank in refit.ranks.items()):
        peft_config = with_ranks(peft_config, refit.ranks, refit.alphas, refit.manifest.kept)
    tensors = read_tensors(refit.stored.folder / ADAPTER_FILE, None)
    for name in refit.ranks:
        _replace_factors(refit, tensors, name, step)

    def save_adapter(path: Path) -> None:
        save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})
        text = json.dumps(peft_config, indent=2, sort_keys=True)
        (path / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")

    def copy_statistics(path: Path) -> None:
        for name in statistics_files(refit.manifest):
            shutil.copyfile(refit.stored.folder / name, path / name)

    report = _new_report(refit, step, output_dir)
    write_init(
        output_dir,
        bases=refit.bases,
        save_adapter=save_adapter,
        save_report=lambda path: dataclasses.replace(report, artifact=None).save(path / REPORT_FILE),  # no local path
        save_statistics=copy_statistics if refit.config.save_statistics else None,
        make_manifest=lambda files: _new_manifest(refit, step, solved_with, files),
    )
    return load_init(output_dir)


def _replace_factors(refit: _Refit, tensors: dict[str, Tensor], name: str, step: float | None) -> None:
    """Put a layer's new factors in the place of the old ones, in their dtype."""
    basis, rank, scaling = refit.bases[name], refit.ranks[name], refit.scaling(name)
    factors = factors_at_step(
        basis.basis_A[:rank].double(),
        basis.basis_B[:, :rank].double(),
        refit.config,
        peft_scaling=scaling,
        step_size=step,
    )
    for which, factor in zip(("lora_A", "lora_B"), factors, strict=True):
        key = f"{PEFT_PREFIX}{name}.{which}.weight"
        tensors[key] = factor.to(tensors[key].dtype).contiguous()
    update_norm = scaling * (factors[1] @ factors[0]).norm().item()
    refit.reports[name] = dataclasses.replace(
        refit.reports[name], rank=rank, peft_scaling=scaling, update_norm=update_norm
    )


def _new_report(refit: _Refit, step: float | None, output_dir: Path) -> LoRADAReport:
    """Return the stored report with what changed; losses are left out, which nothing measured for this adapter."""
    old = read_report(refit.stored.folder / REPORT_FILE)
    return LoRADAReport(
        layers=[refit.reports[layer.name] for layer in old.layers],
        kept=dict(refit.manifest.kept),
        num_samples=old.num_samples,
        num_unlabelled=old.num_unlabelled,
        num_search_samples=old.num_search_samples,
        population_size=population_of(refit.manifest, refit.config),
        batch_size=old.batch_size,
        loss_reduction=old.loss_reduction,
        step_size=step,
        step_size_by_rank=_ladder(refit),
        config=refit.config.to_dict(),
        data_fingerprint=old.data_fingerprint,
        notes=[*refit.notes, "refitted from a stored initialisation: no loss was measured with this adapter"],
        artifact=str(output_dir),
    )


def _ladder(refit: _Refit) -> dict[int, float]:
    """Return the searched steps for the ranks that are stored, if the step is a searched one."""
    largest = max(basis.basis_A.shape[0] for basis in refit.bases.values())
    steps = steps_by_rank(refit.manifest) if refit.config.searches_step else {}
    return {rank: step for rank, step in steps.items() if rank <= largest}


def _new_manifest(refit: _Refit, step: float | None, solved_with: list[str], files: dict[str, FileEntry]) -> Manifest:
    old = refit.manifest
    return dataclasses.replace(
        old,
        config=refit.config.to_dict(),
        data={**_without_identity(old.data), "population_size": population_of(old, refit.config)},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        step_size=step,
        step_size_by_rank={str(rank): found for rank, found in _ladder(refit).items()},
        versions=package_versions(),
        layers={name: _layer_entry(refit, name, layer) for name, layer in old.layers.items()},
        files=files,
        refitted_from={
            "manifest": manifest_digest(old),
            "created": old.created,
            SOLVED_AGAIN_WITH: {
                **solved_again_with(old),
                **{name: getattr(refit.config, name) for name in solved_with},
            },
        },
    )


def _without_identity(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out what says that it is what a run would compute, which a refitted one is not."""
    return {name: value for name, value in data.items() if name != IDENTITY}


def _layer_entry(refit: _Refit, name: str, old: LayerEntry) -> LayerEntry:
    report = refit.reports[name]
    return dataclasses.replace(
        old,
        rank=refit.ranks[name],
        max_rank=refit.bases[name].basis_A.shape[0],
        peft_scaling=refit.scaling(name),
        input_damping=report.input_damping,
        output_damping=report.output_damping,
    )
