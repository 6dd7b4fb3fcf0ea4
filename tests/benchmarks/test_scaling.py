"""benchmarks/scaling.py at a tiny size: one process and two are measured, and the plan is compared with that."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
TINY = ("--blocks", "1", "--num_samples", "4", "--length", "16", "--repeats", "1")
CASES = {
    "one": "one process, one pass",
    "samples": "two share the samples",
}


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


def tables(text):
    """Return the tables of a page, each as a list of its rows, and a row as what its columns say."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            found.append([list(zip(titles, row, strict=True)) for row in rows])
    return found


def test_each_case_is_measured_by_each_of_its_processes_and_compared_with_the_plan(tmp_path):
    printed, page, runs = measure(tmp_path / "scaling.json")
    assert {name: [len(run) for run in of_case] for name, of_case in runs.items()} == {
        "one": [1, 1],
        "samples": [2, 2],
    }
    for timed, memory in runs.values():
        assert all(process["tensor_bytes"] is None and process["seconds"] > 0 for process in timed)
        assert all(process["tensor_bytes"] > 0 for process in memory)
    assert printed.strip() == page.strip()
    first = tables(page)[0]
    assert [row[0][1] for row in first] == list(CASES.values())
    for name, row in zip(CASES, first, strict=True):
        by_title = dict(row)
        plan = runs[name][0][0]["plan"]
        assert by_title["passes"] == str({"one": 4, "samples": 2}[name])
        assert by_title["planned"] == f"{plan['peak_bytes'] / 2**20:.0f}"
        memory = max(process["tensor_bytes"] for process in runs[name][1])
        assert by_title["tensors at their peak, MiB"] == f"{memory / 2**20:.0f}"
    numbers = r"(\d+\.\d+) to (\d+\.\d+)"
    pattern = f"Planned / measured peak of tensors.*: {numbers}"
    values = [float(value) for value in re.search(pattern, page).groups()]
    peaks = [
        of_case[0][0]["plan"]["peak_bytes"] / max(process["tensor_bytes"] for process in of_case[1])
        for of_case in runs.values()
    ]
    assert values == [pytest.approx(min(peaks), abs=0.006), pytest.approx(max(peaks), abs=0.006)]
