"""benchmarks/scaling.py at a tiny size: one process and two are measured, and the plan is compared with that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
TINY = ("--blocks", "1", "--num_samples", "4", "--length", "16", "--repeats", "1")
CASES = {"one process, one pass": 4, "two share the samples": 2}
"""Titles, and samples that the busiest process runs."""


def measure(output):
    """Return what the script printed, the file beside it, and the runs."""
    root = SCRIPT.parents[1]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--cases", "samples", "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, output.with_suffix(".md").read_text(), json.loads(output.read_text())["runs"]


def test_each_case_is_measured_by_each_of_its_processes_and_compared_with_the_plan(tmp_path):
    printed, page, runs = measure(tmp_path / "scaling.json")
    counts = {name: [len(run) for run in of_case] for name, of_case in runs.items()}
    assert counts == {"one": [1, 1], "samples": [2, 2]}
    assert printed.strip() == page.strip()
    for (title, passes), (timed, memory) in zip(CASES.items(), runs.values(), strict=True):
        assert all(process["tensor_bytes"] is None and process["seconds"] > 0 for process in timed)
        tensors, plan = max(process["tensor_bytes"] for process in memory), timed[0]["plan"]
        row = next(line for line in page.splitlines() if line.startswith(f"| {title} |"))
        assert f" | {passes} | {tensors / 2**20:.0f} | {plan['peak_bytes'] / 2**20:.0f} | " in row
