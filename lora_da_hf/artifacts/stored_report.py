"""The report in the folder of a stored initialisation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_da_hf.artifacts.schema import Manifest
from lora_da_hf.artifacts.strict_json import parse_json, read_dataclass, too_large
from lora_da_hf.errors import ArtifactError
from lora_da_hf.report import LayerReport, LoRADAReport

_BYTES = 1 << 20
_BYTES_PER_LAYER = 2 << 10
_BYTES_PER_DIRECTION = 128
"""An eigenvalue and two sums."""


def read_report(path: Path, manifest: Manifest) -> LoRADAReport:
    """Read a report that comes from outside: every field there, of its type, and every number finite.

    Args:
        path: Of the file, which is there.
        manifest: Of its folder, whose layers limit the file's length.

    Raises:
        ArtifactError: if it is anything else.
    """
    if path.stat().st_size > _most_bytes(manifest):
        raise too_large(str(path), path.stat().st_size, _most_bytes(manifest))
    values = parse_json(path.read_bytes(), str(path))
    entries = values.get("layers") if isinstance(values, dict) else None
    if not isinstance(entries, list):
        raise ArtifactError(f"{path} is not the report of an initialisation. Fetch it again.")
    layers: list[LayerReport] = [read_dataclass(LayerReport, entry, f"{path}: a layer") for entry in entries]
    if not all(layer.eigenvalues for layer in layers):
        raise ArtifactError(f"{path}: a layer has no eigenvalues. Fetch it again.")
    report: LoRADAReport = read_dataclass(LoRADAReport, {**values, "layers": layers}, str(path))
    return dataclasses.replace(
        report,
        step_size_by_rank={int(rank): step for rank, step in report.step_size_by_rank.items()},
        search=[(step, loss) for step, loss in report.search],
    )


def _most_bytes(manifest: Manifest) -> int:
    """Return how long a report can be, which has names, settings and reasons in common with the manifest."""
    directions = sum(layer.max_rank for layer in manifest.layers.values())
    per_layer = _BYTES_PER_LAYER * len(manifest.layers) + _BYTES_PER_DIRECTION * directions
    return _BYTES + len(manifest.to_json()) + per_layer
