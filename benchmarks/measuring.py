"""What all benchmarks measure with: peak memory, the machine, the code, and runs that are kept as they finish."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def reset_peak() -> None:
    """Begin a new peak of the GPU's memory, or, without one, of this process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the peak since it was reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def machine() -> dict[str, Any]:
    """Return what identifies the machine and the versions."""
    import peft
    import transformers

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": datetime.date.today().isoformat(),
        **gpu,
        "cpu": cpu[1] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def write_runs(output: Path, settings: dict[str, Any], runs: dict[str, Any]) -> None:
    """Write the runs that are done."""
    content = {"machine": machine(), "settings": settings, "package_sha256": package_digest(), "runs": runs}
    output.write_text(json.dumps(content, indent=1) + "\n")


def package_digest() -> str:
    """Return a hash of the package's code."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "lora_da_hf").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
