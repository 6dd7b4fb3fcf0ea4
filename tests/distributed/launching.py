"""Starting two processes, and reading what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TIMEOUT = 900
"""Seconds. The longest run takes 90 on two quiet cores, and over 300 on slow ones that run another beside it."""
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
]


def run(command, **environment):
    """Run a command that starts processes, and end all of them should they hang.

    Returns:
        What they printed, the exit status, and the seconds that it took.
    """
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "distributed")])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the processes hang\n{output[-4000:]}")
    return output, process.returncode, time.monotonic() - start


def launch(script, arguments, folder, **environment):
    """Run a script of this folder in two processes, which may abort at exit, in gloo's teardown, once they are done."""
    command = [*TORCHRUN, str(TESTS / "distributed" / script), *arguments, str(folder)]
    output, _, _ = run(command, DS_ACCELERATOR="cpu", **environment)
    if not all((folder / f"done.process{process}.json").is_file() for process in range(2)):
        pytest.fail(output[-4000:])


def result(folder, name, process):
    return json.loads((folder / f"{name}.process{process}.json").read_text())
