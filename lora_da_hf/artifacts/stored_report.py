"""The report in the folder of a stored initialisation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_da_hf.artifacts.strict_json import parse_json, read_dataclass
from lora_da_hf.errors import ArtifactError
from lora_da_hf.report import LayerReport, LoRADAReport

_MAX_BYTES = 512 << 20


def read_report(path: Path) -> LoRADAReport:
    """Read a report that comes from outside: every field there, of its type, and every number finite.

    Raises:
        ArtifactError: if it is anything else.
    """
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} does not exist. Fetch the initialisation again.")
    if path.stat().st_size > _MAX_BYTES:
        raise ArtifactError(f"{path} is larger than any report. Do not use it.")
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
