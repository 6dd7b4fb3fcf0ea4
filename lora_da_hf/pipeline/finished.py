"""An initialisation that was made before with the same model, adapter, samples and settings, told by hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_da_hf.adapters.write import write_factors
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, MANIFEST_FILE
from lora_da_hf.artifacts.store import StoredInit, load_init
from lora_da_hf.artifacts.tensors import read_tensors, stored_factor
from lora_da_hf.errors import ArtifactError
from lora_da_hf.pipeline.base_model import trained_heads
from lora_da_hf.pipeline.heads import stored_name, write_heads
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import LOSS, Probe
from lora_da_hf.report import LoRADAReport

logger = logging.getLogger(__name__)

Identity = dict[str, str | float]

_LOSS_TOLERANCE = 1e-3
_NO_MATTER = {
    *("batch_size", "memory_budget"),  # how it is computed, not what
    "num_samples",  # the samples themselves count
    "save_statistics",  # those that are stored beside what was computed are kept
    "freeze_a",  # for training
}
_NO_MATTER_OF_ADAPTER = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),  # compared by layer, and so are these
    *("target_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"),
}


def identify(job: Job, digests: Mapping[str, list[str]], probe: Probe) -> Identity:
    """Return a hash of each thing that an initialisation depends on, and losses of a few samples.

    The losses stand for what cannot be hashed: the loss function, and weights that the base's fingerprint does not
    sample. They are compared with a tolerance.
    """
    base = job.base_model
    settings = {name: value for name, value in job.config.to_dict().items() if name not in _NO_MATTER}
    together = [job.batch_size, job.processes.count] if probe.settings.reduction.kind == "batch" else []
    unasked = {"revision", "name_or_path"} if base.weights_sha256 else {"revision"}
    adapter = {
        name: [t.in_features, t.out_features, t.rank, job.max_ranks[name], float(t.peft_scaling)]
        for name, t in job.targets.items()
    }
    config: Any = getattr(job.model, "peft_config", {}).get(job.scan.adapter_name)
    of_peft = {} if config is None else {n: v for n, v in config.to_dict().items() if n not in _NO_MATTER_OF_ADAPTER}
    facts = {
        "settings": [settings, job.seed, probe.splits.population_size, together],
        "base model": [
            {name: value for name, value in base.model_dump().items() if name not in unasked},
            sorted({str(parameter.dtype) for parameter in job.model.parameters()}),
        ],
        "adapter": [adapter, sorted(job.scan.kept), job.scan.adapter_name, of_peft],
        "samples": list(digests.values()),
        "version of lora_da_hf": importlib.metadata.version("lora_da_hf"),
    }
    texts = {name: json.dumps(value, sort_keys=True, default=_as_text) for name, value in facts.items()}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in probe.losses.items()}
    return job.processes.broadcast({**hashes, **losses}, 0)


def _as_text(value: Any) -> Any:
    """Return what JSON has no form for: PEFT's configs hold sets of names, and objects."""
    return sorted(value) if isinstance(value, set) else repr(value)


def _changes(before: Mapping[str, Any], now: Identity) -> list[str]:
    """Name what differs between two identities; everything, if the first is empty."""

    def same(name: str, value: str | float) -> bool:
        if isinstance(value, float) and isinstance(before[name], float):
            return math.isclose(before[name], value, rel_tol=_LOSS_TOLERANCE)
        return before[name] == value

    found = [name for name, value in now.items() if set(before) != set(now) or not same(name, value)]
    return list(dict.fromkeys(LOSS if name.startswith(LOSS) else name for name in found))


def take_over_finished(job: Job, folder: Path, identity: Identity) -> tuple[LoRADAReport | None, tuple[str, ...]]:
    """Write to the adapter what a folder holds, if it is what would be computed; the first process reads it for all.

    Returns the stored report with this run's times, or None if that is not what would be computed; and what to note.
    """
    with job.stage("load"):
        stored, notes = _read(job, folder, identity) if job.processes.is_main else (None, ())
        heads = trained_heads(job.model, job.scan.adapter_name)
        factors, of_heads = list[Tensor](), dict[str, Tensor]()
        if stored is not None:
            tensors = read_tensors(folder / ADAPTER_FILE, None)
            found = [stored_factor(tensors, x.name, part, x.rank) for x in stored.report.layers for part in "AB"]
            factors = [factor.clone() for factor in found if factor is not None]  # a view would take all of it along
            of_heads = {name: tensors[stored_name(name, job.scan.adapter_name)].clone() for name in heads}
        mine = (stored and stored.report, notes, factors, of_heads)
        report, notes, factors, of_heads = job.processes.broadcast(mine, 0)
        if report is None:
            return None, notes
        write_heads(heads, of_heads)
        for layer, lora_A, lora_B in zip(report.layers, factors[::2], factors[1::2], strict=True):
            write_factors(job.targets[layer.name], lora_A, lora_B)
    note = f"reusing {folder}, which was made before with the same model, adapter, samples and settings"
    job.say(f"LoRA-DA: {note}")
    facts: dict[str, Any] = {"seconds": job.seconds, "config": job.config.to_dict(), "artifact": str(folder)}
    return dataclasses.replace(report, notes=[*report.notes, note], **facts), ()


def _read(job: Job, folder: Path, identity: Identity) -> tuple[StoredInit | None, tuple[str, ...]]:
    """Return what would be computed, if the folder has it, and a note if what it has is broken."""
    if not (folder / MANIFEST_FILE).is_file():
        return None, ()
    try:
        stored = load_init(folder)
    except ArtifactError as error:
        logger.warning("LoRA-DA: the initialisation in %s cannot be used and is replaced (%s)", folder, error)
        return None, ("an initialisation that was there before could not be used and was replaced",)
    differing = _changes(stored.manifest.identity, identity)
    has_statistics = bool(stored.manifest.statistics_files)
    asked = job.config.save_statistics
    if asked and not (stored.manifest.leading_files if asked == "leading" else has_statistics):
        differing.append("save_statistics")
    if not stored.report.step_size and job.config.freeze_a != stored.manifest.config.freeze_a:
        differing.append("freeze_a")  # without a step, A spans the subspace only where it is frozen
    if differing:
        note = "LoRA-DA: the initialisation in %s is replaced. What changed: %s"
        logger.log(logging.WARNING if has_statistics else logging.INFO, note, folder, ", ".join(differing))
        return None, ()
    return stored, ()
