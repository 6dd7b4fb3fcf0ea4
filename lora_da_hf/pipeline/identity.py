"""What makes two initialisations the same: model, adapter, samples and settings, as hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from typing import Any

from lora_da_hf.pipeline.agreement import Digests
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import Probe

LOSS, MOVED_LOSS = "loss", "loss of moved outputs"
_LOSS_TOLERANCE = 1e-3
_NO_MATTER = {
    *("batch_size", "memory_budget", "schedule", "statistics_save_steps"),  # how it is computed, not what
    *("num_samples", "sample_selection"),  # the samples themselves count
    *("seed", "population_size"),  # those that were used count, whoever gave them
    "save_statistics",  # those that are stored beside what was computed are kept
    "freeze_a",  # for training
}
_COMPARED_BY_LAYER = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
}
_NO_MATTER_OF_ADAPTER = {"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"}


def identify(job: Job, probe: Probe, digests: Digests) -> dict[str, Any]:
    """Return a hash of each thing that an initialisation depends on, and losses of a few samples.

    The losses stand for what cannot be hashed: the loss function, and weights that the base's fingerprint does not
    sample. They are the base's, where some losses are the same whatever they ask for (DPO's is log 2), one of outputs
    that were moved, and those of samples unlike each other, alone and in pairs, which a loss may weigh unlike. They are
    compared with a tolerance.
    """
    splits = probe.splits
    job.report.data_fingerprint = hashlib.sha256("".join(digests["statistics"]).encode()).hexdigest()
    settings = {name: value for name, value in job.config.to_dict().items() if name not in _NO_MATTER}
    dtypes = sorted({str(parameter.dtype) for parameter in job.model.parameters()})
    together = [job.batch_size, job.ranks.size] if probe.settings.reduction.kind == "batch" else []
    unasked = {"revision", "name_or_path"} if job.base_model.weights_sha256 else {"revision"}
    adapter = {
        name: [t.in_features, t.out_features, t.rank, job.max_ranks[name], float(t.peft_scaling)]
        for name, t in job.targets.items()
    }
    facts = {
        "settings": {**settings, "seed": job.seed, "population_size": splits.population_size, "together": together},
        "base model": [
            {name: value for name, value in job.base_model.model_dump().items() if name not in unasked},
            dtypes,
        ],
        "adapter": [adapter, sorted(job.scan.kept), job.scan.adapter_name, _peft_settings(job)],
        "samples": [list(part) for part in digests.values()],
        "version of lora_da_hf": importlib.metadata.version("lora_da_hf"),
    }
    hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in facts.items()}
    measured = {LOSS: probe.loss, MOVED_LOSS: probe.moved_loss}
    measured |= {f"{LOSS} of unlike samples {i}": loss for i, loss in enumerate(probe.unlike_losses)}
    losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in measured.items()}
    return job.ranks.gather({**hashes, **losses})[0]


def _peft_settings(job: Job) -> dict[str, Any]:
    """Return what the adapter's config says beside the layers and their ranks, which are compared as they are."""
    config: Any = getattr(job.model, "peft_config", {}).get(job.scan.adapter_name)
    settings: dict[str, Any] = {} if config is None else config.to_dict()
    unasked = _COMPARED_BY_LAYER | _NO_MATTER_OF_ADAPTER
    return {
        name: sorted(map(str, value)) if isinstance(value, set | list | tuple) else repr(value)
        for name, value in sorted(settings.items())
        if name not in unasked
    }


def changes(before: Mapping[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what differs between two identities; everything, if the first is empty."""
    if set(before) != set(now):
        return sorted({LOSS if name.startswith(LOSS) else name for name in now})
    found = [name for name, value in now.items() if not _same(before[name], value)]
    return list(dict.fromkeys(LOSS if name.startswith(LOSS) else name for name in found))


def _same(before: Any, now: Any) -> bool:
    if isinstance(now, float):
        return isinstance(before, float) and math.isclose(before, now, rel_tol=_LOSS_TOLERANCE)
    return before == now
