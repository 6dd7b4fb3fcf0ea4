"""What makes two initialisations the same: model, adapter, samples and settings, as hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from typing import Any

from lora_da_hf.pipeline.agreement import Chosen
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import LOSS, Probe

Identity = dict[str, str | float]

_LOSS_TOLERANCE = 1e-3
_NO_MATTER = {
    *("batch_size", "memory_budget"),  # how it is computed, not what
    "num_samples",  # the samples themselves count
    "save_statistics",  # those that are stored beside what was computed are kept
    "freeze_a",  # for training
}
_COMPARED_BY_LAYER = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
}
_NO_MATTER_OF_ADAPTER = {"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"}


def identify(job: Job, chosen: Chosen, probe: Probe) -> Identity:
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
    facts = {
        "settings": [settings, job.seed, probe.splits.population_size, together],
        "base model": [
            {name: value for name, value in base.model_dump().items() if name not in unasked},
            sorted({str(parameter.dtype) for parameter in job.model.parameters()}),
        ],
        "adapter": [adapter, sorted(job.scan.kept), job.scan.adapter_name, _peft_settings(job)],
        "samples": list(chosen.digests.values()),
        "version of lora_da_hf": importlib.metadata.version("lora_da_hf"),
    }
    hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in facts.items()}
    losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in probe.losses.items()}
    return job.processes.gather({**hashes, **losses})[0]


def _peft_settings(job: Job) -> dict[str, Any]:
    """Return what the adapter's config says beside the layers and their ranks, which are compared as they are."""
    config: Any = getattr(job.model, "peft_config", {}).get(job.scan.adapter_name)
    settings: dict[str, Any] = {} if config is None else config.to_dict()
    return {
        name: sorted(map(str, value)) if isinstance(value, set | list | tuple) else repr(value)
        for name, value in sorted(settings.items())
        if name not in _COMPARED_BY_LAYER | _NO_MATTER_OF_ADAPTER
    }


def changes(before: Mapping[str, Any], now: Identity) -> list[str]:
    """Name what differs between two identities; everything, if the first is empty."""
    found = [name for name, value in now.items() if set(before) != set(now) or not _same(before[name], value)]
    return list(dict.fromkeys(LOSS if name.startswith(LOSS) else name for name in found))


def _same(before: Any, now: str | float) -> bool:
    if isinstance(now, float):
        return isinstance(before, float) and math.isclose(before, now, rel_tol=_LOSS_TOLERANCE)
    return before == now
