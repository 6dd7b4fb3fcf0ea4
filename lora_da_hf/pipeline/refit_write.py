"""How a refitted initialisation is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_da_hf.adapters.experts import resize_factors, slice_factors
from lora_da_hf.adapters.write import dora_magnitude
from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.basis import StoredBasis
from lora_da_hf.artifacts.files import write_tensors
from lora_da_hf.artifacts.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    Manifest,
    RefittedFrom,
)
from lora_da_hf.artifacts.other_tensors import MAGNITUDE
from lora_da_hf.artifacts.peft_config import (
    alpha_divisor,
    alpha_of,
    expert_of,
    holder_of,
    is_parameter,
    rank_of,
    with_ranks,
)
from lora_da_hf.artifacts.statistics_store import statistics_files
from lora_da_hf.artifacts.store import StoredInit, load_init, write_init
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.losses import base_model_of
from lora_da_hf.pipeline.save import made_now
from lora_da_hf.pipeline.stored import (
    population_of,
    stored_step,
)
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.theory.adapter_factors import factors_at_step
from lora_da_hf.theory.layer_scales import rounding_notes


@dataclasses.dataclass(kw_only=True)
class Refit:
    """A stored initialisation on its way to another one.

    Attributes:
        stored: What it comes from.
        config: The new settings.
        peft_config: PEFT's, for the stored ranks.
        bases: By layer, stored or solved anew.
        reports: By layer.
        step_unit: What the displacements over tokens are divided by.
        ranks: By layer.
        alphas: PEFT's, by layer.
        notes: What a user should know.
        base: The base model, for an adapter that is made for its weights.
    """

    stored: StoredInit
    config: LoRADAConfig
    peft_config: dict[str, Any]
    bases: dict[str, StoredBasis]
    reports: dict[str, LayerReport]
    step_unit: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    notes: list[str]
    base: nn.Module | None

    @property
    def manifest(self) -> Manifest:
        """The manifest that it comes from."""
        return self.stored.manifest

    def scaling(self, name: str) -> float:
        """What PEFT multiplies ``B A`` with in a layer."""
        return self.alphas[name] / alpha_divisor(self.peft_config, self.ranks[name])


def write_refit(refit: Refit, output_dir: Path, solved_with: list[str]) -> StoredInit:
    """Write the new initialisation, all of it or nothing, and read it back.

    Args:
        refit: What it is made of.
        output_dir: Where.
        solved_with: Settings of the solve that are others than the stored ones.
    """
    if refit.config.searches_step:
        step, source = stored_step(refit.manifest, refit.ranks)
        refit.notes.append(source)
    else:
        step = None if refit.config.step_size is None else float(refit.config.step_size)
    peft_config = _new_peft_config(refit)
    tensors = _new_tensors(refit, peft_config, step)

    def save_adapter(path: Path) -> None:
        write_tensors(path / ADAPTER_FILE, tensors, {"format": "pt"})
        text = json.dumps(peft_config, indent=2, sort_keys=True)
        (path / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")

    def copy_statistics(path: Path) -> None:
        for name in statistics_files(refit.manifest):
            shutil.copyfile(refit.stored.folder / name, path / name)

    write_init(
        output_dir,
        bases=refit.bases,
        save_adapter=save_adapter,
        save_statistics=copy_statistics if refit.config.save_statistics else None,
        make_manifest=lambda files: Manifest(
            **made_now(),
            base_model=refit.manifest.base_model,
            refitted_from=refitted_from(refit.manifest, {name: getattr(refit.config, name) for name in solved_with}),
            files=files,
            report=_new_report(refit, step),
        ),
    )
    return load_init(output_dir)


def _new_peft_config(refit: Refit) -> dict[str, Any]:
    if all(refit.manifest.layers[name].rank == rank for name, rank in refit.ranks.items()):
        return refit.peft_config
    config = refit.peft_config
    names = [name for name in refit.stored.report.kept if not is_parameter(config, name)]
    kept = {name: (rank_of(config, name), alpha_of(config, name)) for name in names}
    return with_ranks(config, refit.ranks, refit.alphas, kept)


def _new_tensors(refit: Refit, peft_config: dict[str, Any], step: float | None) -> dict[str, Tensor]:
    """Return the stored adapter's tensors with the new factors in the place of the old ones, in their dtype."""
    tensors = read_tensors(refit.stored.folder / ADAPTER_FILE, None)
    old, new = refit.peft_config["r"], peft_config["r"]
    names = (*refit.ranks, *refit.stored.report.kept)
    for holder in {holder_of(name) for name in names if is_parameter(refit.peft_config, name)} if old != new else ():
        keys = [_key(holder, which) for which in ("lora_A", "lora_B")]
        resized = resize_factors(*(tensors[key] for key in keys), old=old, new=new, seed=refit.stored.report.seed)
        tensors.update(zip(keys, resized, strict=True))
    for name in refit.ranks:
        _replace_factors(refit, tensors, name, step)
    return tensors


def _key(name: str, which: str) -> str:
    return f"{PEFT_PREFIX}{name}.{which}.weight"


def _replace_factors(refit: Refit, tensors: dict[str, Tensor], name: str, step: float | None) -> None:
    basis, rank, scaling = refit.bases[name], refit.ranks[name], refit.scaling(name)
    lora_A, lora_B = factors_at_step(
        basis.basis_A[:rank].double(),
        basis.basis_B[:, :rank].double(),
        refit.config,
        peft_scaling=scaling,
        step_size=step,
    )
    key_A, key_B = (_key(holder_of(name), which) for which in ("lora_A", "lora_B"))
    if holder_of(name) != name:
        places = slice_factors(tensors[key_A], tensors[key_B], rank=rank, index=expert_of(name))
        for place, factor in zip(places, (lora_A, lora_B), strict=True):
            place.copy_(factor)
    else:
        tensors[key_A] = lora_A.to(tensors[key_A].dtype).contiguous()
        tensors[key_B] = lora_B.to(tensors[key_B].dtype).contiguous()
    if refit.base is not None and refit.peft_config.get("use_dora"):
        magnitude = dora_magnitude(_base_layer(refit.base, name), tensors[key_A], tensors[key_B], scaling)
        key = f"{PEFT_PREFIX}{name}{MAGNITUDE}"
        tensors[key] = magnitude.to(tensors[key]).reshape(tensors[key].shape)
    update_norm = scaling * (lora_B @ lora_A).norm().item()
    refit.reports[name] = dataclasses.replace(
        refit.reports[name], rank=rank, peft_scaling=scaling, update_norm=update_norm
    )


def _base_layer(base: nn.Module, name: str) -> nn.Module:
    layer = base_model_of(base).get_submodule(name)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _new_report(refit: Refit, step: float | None) -> LoRADAReport:
    """Return the stored report with what changed; losses are left out, which nothing measured for this adapter."""
    old = refit.stored.report
    notes = [*refit.notes, *rounding_notes(refit.reports.values(), layer_steps=refit.config.layer_steps)]
    return LoRADAReport(
        layers=[refit.reports[layer.name] for layer in old.layers],
        kept=dict(old.kept),
        adapter_name=old.adapter_name,
        seed=old.seed,
        num_samples=old.num_samples,
        num_unlabelled=old.num_unlabelled,
        num_search_samples=old.num_search_samples,
        population_size=population_of(refit.manifest, refit.config),
        batch_size=old.batch_size,
        loss_reduction=old.loss_reduction,
        step_unit=refit.step_unit,
        step_size=step,
        step_size_by_rank=_ladder(refit),
        config=refit.config.to_dict(),
        data_fingerprint=old.data_fingerprint,
        notes=[*notes, "refitted from a stored initialisation: no loss was measured with this adapter"],
    )


def _ladder(refit: Refit) -> dict[int, float]:
    """Return the searched steps for the ranks that are stored, if the step is a searched one."""
    largest = max(basis.basis_A.shape[0] for basis in refit.bases.values())
    steps = refit.stored.report.step_size_by_rank if refit.config.searches_step else {}
    return {rank: step for rank, step in steps.items() if rank <= largest}


def refitted_from(manifest: Manifest, solved_with: Mapping[str, Any] = MappingProxyType({})) -> RefittedFrom:
    """Return what the manifest of a refitted initialisation says of where it comes from.

    Args:
        manifest: Of what was refitted.
        solved_with: Settings of the solve that are others now.
    """
    before = manifest.refitted_from.changed if manifest.refitted_from else {}
    return RefittedFrom(manifest=manifest.digest, changed={**before, **solved_with})
