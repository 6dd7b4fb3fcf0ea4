"""How a refitted initialisation is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_da_hf.adapters.experts import resize_factors
from lora_da_hf.adapters.write import dora_magnitude
from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX, expert_of, holder_of, pattern_names, rank_of, with_ranks
from lora_da_hf.artifacts.adapter_tensors import MAGNITUDE, factor_key, stored_factor
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE, ADAPTER_FILE, RefittedFrom
from lora_da_hf.artifacts.store import StoredInit, write_init
from lora_da_hf.artifacts.tensors import read_tensors, write_tensors
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.pipeline.base_model import base_modules
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.theory.adapter_factors import factors_at_step
from lora_da_hf.theory.layer_scales import rounding_notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refit:
    """What a new initialisation is made of.

    Attributes:
        changed: Those of the solve that are others now.
        layers: Reports of the layers, with the new rank and the scaling of all.
        step_unit: What the displacements over tokens are divided by.
        step: How far step 0 goes; None: each layer's follows from `stable_gamma`.
    """

    stored: StoredInit
    config: LoRADAConfig
    changed: list[str]
    bases: Mapping[str, LayerSolution]
    layers: Mapping[str, LayerReport]
    step_unit: float
    step: float | None
    notes: list[str]


def write_refit(refit: Refit, output_dir: Path, base_model: nn.Module | None) -> None:
    """Write the new initialisation: all of it, or nothing. The magnitudes of DoRA follow from the base model."""
    manifest = refit.stored.manifest
    before = manifest.refitted_from.changed if manifest.refitted_from else {}
    changed = {**before, **{name: getattr(refit.config, name) for name in refit.changed}}
    peft_config = _new_peft_config(refit)
    tensors, norms = _new_tensors(refit, peft_config, base_model)
    statistics = manifest.statistics_files if refit.config.save_statistics else []

    def save_adapter(path: Path) -> None:
        write_tensors(path / ADAPTER_FILE, tensors)
        (path / ADAPTER_CONFIG_FILE).write_text(json.dumps(peft_config, indent=2, sort_keys=True), encoding="utf-8")

    write_init(
        output_dir,
        bases=refit.bases,
        report=_new_report(refit, norms),
        base_model=manifest.base_model,
        save_adapter=save_adapter,
        statistics=[refit.stored.folder / name for name in statistics],
        refitted_from=RefittedFrom(manifest=manifest.digest, changed=changed),
    )


def _new_report(refit: Refit, norms: Mapping[str, float]) -> LoRADAReport:
    """Return the stored report with what changed; losses are left out, which nothing measured for this adapter."""
    layers = [dataclasses.replace(layer, update_norm=norms[name]) for name, layer in refit.layers.items()]
    largest = max(layer.max_rank for layer in layers)
    steps = refit.stored.report.step_size_by_rank if refit.config.searches_step else {}
    return dataclasses.replace(
        refit.stored.report,
        layers=layers,
        step_unit=refit.step_unit,
        step_size=refit.step,
        step_size_by_rank={rank: step for rank, step in steps.items() if rank <= largest},
        search=[],
        search_loss_before=None,
        search_loss_after=None,
        unseen_loss_before=None,
        unseen_loss_after=None,
        num_unseen_samples=0,
        seconds={},
        plan="",
        config=refit.config.to_dict(),
        notes=[
            *refit.notes,
            *rounding_notes(layers, layer_steps=refit.config.layer_steps),
            "refitted from a stored initialisation: no loss was measured with this adapter",
        ],
    )


def _new_peft_config(refit: Refit) -> dict[str, Any]:
    """Return PEFT's configuration for the new ranks; what PEFT initialised keeps its own, at the scaling of all.

    Parameters get the rank of the experts: PEFT warns of patterns for them.
    """
    config, kept = refit.stored.peft_config, refit.stored.report.kept
    names = pattern_names(config, (*kept, *refit.layers))
    of_experts = next((layer.rank for name, layer in refit.layers.items() if expert_of(name) is not None), None)
    ranks = {
        key: rank_of(config, key) if key == name or of_experts is None else of_experts
        for name in kept
        for key in names[name]
    }
    ranks |= {key: layer.rank for name, layer in refit.layers.items() for key in names[name]}
    return with_ranks(config, ranks, next(iter(refit.layers.values())).peft_scaling)


def _new_tensors(
    refit: Refit, peft_config: dict[str, Any], base_model: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the stored adapter's tensors with the new factors in place of the old ones, and the norms of updates."""
    tensors = read_tensors(refit.stored.folder / ADAPTER_FILE, None)
    _resize_parameters(refit, peft_config, tensors)
    modules = {} if base_model is None else base_modules(base_model)
    norms: dict[str, float] = {}
    for name, layer in refit.layers.items():
        basis = refit.bases[name]
        lora_A, lora_B = factors_at_step(
            basis.basis_A[: layer.rank].double(),
            basis.basis_B[:, : layer.rank].double(),
            refit.config,
            peft_scaling=layer.peft_scaling,
            step_size=refit.step,
        )
        for factor, value in (("A", lora_A), ("B", lora_B)):
            key = factor_key(name, factor)
            place = stored_factor(tensors, name, factor, layer.rank)
            if place is None or expert_of(name) is None:
                tensors[key] = value.to(tensors[key].dtype).contiguous()
            else:
                place.copy_(value)
        if peft_config["use_dora"]:
            key = f"{PEFT_PREFIX}{name}{MAGNITUDE}"
            written = [tensors[factor_key(name, factor)] for factor in ("A", "B")]
            magnitude = dora_magnitude(modules[name], written[0], written[1], layer.peft_scaling)
            tensors[key] = magnitude.to(tensors[key]).reshape(tensors[key].shape)
        norms[name] = layer.peft_scaling * (lora_B @ lora_A).norm().item()
    return tensors, norms


def _resize_parameters(refit: Refit, peft_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Cut the factors of parameters, which all experts share, or lengthen them by what PEFT starts with."""
    holders = {holder_of(name) for name in (*refit.layers, *refit.stored.report.kept)}
    for name, keys in pattern_names(peft_config, sorted(holders)).items():
        if not keys or keys == [name]:
            continue
        old, new = (rank_of(config, keys[0]) for config in (refit.stored.peft_config, peft_config))
        if old != new:
            both = [factor_key(name, factor) for factor in ("A", "B")]
            lora_A, lora_B = (tensors[key] for key in both)
            resized = resize_factors(lora_A, lora_B, old=old, new=new, seed=refit.stored.report.seed)
            tensors.update(zip(both, resized, strict=True))
