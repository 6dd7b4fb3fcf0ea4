"""The report in the folder of a stored initialisation."""

from __future__ import annotations

import math
from typing import Any

from lora_da_hf.artifacts.schema import REPORT_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.errors import ArtifactError
from lora_da_hf.report import LayerReport, LoRADAReport


def load_report(stored: StoredInit) -> LoRADAReport:
    """Read the report of an initialisation.

    Args:
        stored: What `load_init` returned, so that the file's hash was checked.

    Raises:
        ArtifactError: if it is no report, or one of other layers than the manifest's.
    """
    path = stored.folder / REPORT_FILE
    try:
        report = LoRADAReport.load(path)
        ranks = {layer.name: len(layer.eigenvalues) for layer in report.layers if _is_sound(layer)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no report of an initialisation ({error!r}). Fetch it again.") from error
    if ranks != {name: layer.max_rank for name, layer in stored.manifest.layers.items()}:
        raise ArtifactError(f"{path} and the manifest disagree on the layers. Fetch it again.")
    return report


def _is_sound(layer: LayerReport) -> bool:
    numbers = (layer.displacement_norm, layer.residual, layer.input_damping, layer.output_damping, *layer.eigenvalues)
    texts: list[Any] = [layer.solver, *layer.notes]
    return all(map(math.isfinite, numbers)) and all(isinstance(text, str) for text in texts)
