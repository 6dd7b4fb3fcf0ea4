"""An initialisation that was made before with the same model, adapter, samples and settings."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.adapters.targets import Target
from lora_da_hf.adapters.write import write_factors
from lora_da_hf.artifacts.adapter_tensors import stored_factor
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, MANIFEST_FILE
from lora_da_hf.artifacts.statistics_store import statistics_files
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.errors import ArtifactError, WriteError
from lora_da_hf.pipeline.identity import changes
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.ranks_per_layer import give_ranks
from lora_da_hf.report import LoRADAReport

logger = logging.getLogger(__name__)


def take_over_finished(job: Job, identity: Mapping[str, Any]) -> bool:
    """Write to the adapter what ``output_dir`` holds, if it is what would be computed.

    The first process reads it and gives it to the others. The report becomes the stored one, with a note.

    Returns:
        Whether that was so.
    """
    with job.stage("load"), job.ranks.together("look for a finished initialisation"):
        found = _read(job, identity) if job.ranks.is_main else None
    report = job.ranks.gather(None if found is None else found[0])[0]
    if report is None:
        return False
    with job.stage("load"):
        give_ranks(job, {layer.name: layer.rank for layer in report.layers})
        factors = _share(job, [layer.name for layer in report.layers], None if found is None else found[1])
        with job.ranks.stage("write", has_collectives=job.writes_in_step, known=WriteError):
            for name, (lora_A, lora_B) in factors.items():
                write_factors(job.targets[name], lora_A, lora_B)
    note = f"found in {job.output_dir}: made before with the same model, adapter, samples and settings"
    job.say(f"LoRA-DA {note}")
    job.report = dataclasses.replace(
        report,
        seconds=job.report.seconds,
        config=job.report.config,
        artifact=str(job.output_dir),
        notes=[*report.notes, note],
    )
    return True


def _read(job: Job, identity: Mapping[str, Any]) -> tuple[LoRADAReport, dict[str, Tensor]] | None:
    folder = job.output_dir
    if folder is None or not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        stored = load_init(folder)
        differing = changes(stored.manifest.identity, dict(identity))
    except ArtifactError as error:
        job.report.notes.append("an initialisation that was there before could not be used and was replaced")
        logger.warning("LoRA-DA: the initialisation in %s cannot be used and is replaced (%s)", folder, error)
        return None
    has_statistics = bool(statistics_files(stored.manifest))
    if job.config.save_statistics and not has_statistics:
        differing.append("save_statistics")
    if differing:
        note = f"the initialisation in {folder} is of another {', '.join(differing)}: replaced"
        logger.log(logging.WARNING if has_statistics else logging.INFO, "LoRA-DA: %s", note)
        return None
    return stored.report, read_tensors(folder / ADAPTER_FILE, None)


def _share(job: Job, names: Sequence[str], stored: Mapping[str, Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
    targets = [job.targets[name] for name in names]
    shapes = {t.name: ((t.rank, t.in_features), (t.out_features, t.rank)) for t in targets}
    specs = [(shape, _shared_dtype(t)) for t in targets for shape in shapes[t.name]]
    with job.ranks.together("look for a finished initialisation"):
        tensors = None if stored is None else [_stored(stored, t, factor) for t in targets for factor in ("A", "B")]
    shared = job.ranks.broadcast(tensors, specs, 0)
    return dict(zip(names, zip(shared[::2], shared[1::2], strict=True), strict=True))


def _stored(stored: Mapping[str, Tensor], target: Target, factor: str) -> Tensor:
    tensor = stored_factor(stored, target.name, factor, target.rank)
    assert tensor is not None  # load_init has looked
    return tensor.to(_shared_dtype(target))


def _shared_dtype(target: Target) -> torch.dtype:
    """Return a dtype that loses nothing: float32 for narrower adapters, since their float32 copies may be written."""
    return torch.promote_types(target.lora_A.dtype, torch.float32)
