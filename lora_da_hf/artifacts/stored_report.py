"""The report in the folder of a stored initialisation."""

from __future__ import annotations

import math

from lora_da_hf.artifacts.schema import REPORT_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.errors import ArtifactError
from lora_da_hf.report import LoRADAReport


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
        sound = [layer.name for layer in report.layers if math.isfinite(layer.displacement_norm)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no report of an initialisation ({error!r}). Fetch it again.") from error
    if sorted(sound) != sorted(stored.manifest.layers):
        raise ArtifactError(f"{path} and the manifest disagree on the layers. Fetch it again.")
    return report
