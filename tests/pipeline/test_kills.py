"""kill -9 at any point: the next start goes on, to the same bits, and no file is ever half-written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_worker
import pytest
from harness import assert_same_tensors, written_adapter
from safetensors.torch import load_file

from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init

pytestmark = pytest.mark.slow

LONGEST_WAIT = 60
AT_RANDOM = None
KILLS = (AT_RANDOM, 1, -1, 9, AT_RANDOM, 18, AT_RANDOM, 5, AT_RANDOM, 0)  # else: in the middle of that write


def start(folder, *arguments):
    """Start the worker and wait until it is about to begin."""
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed_worker.py")), str(folder), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "begins\n"
    return process


def check_whole(folder):
    """Verify that every file under its final name can be read as a whole."""
    for path in folder.rglob("*"):
        partial = any(".partial" in part for part in path.relative_to(folder).parts)
        if path.is_file() and not partial:
            load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def test_ten_kills_change_no_bit(tmp_path):
    killed_worker.initialize(tmp_path / "whole")
    expected = written_adapter(tmp_path / "whole")
    generator = random.Random(0)
    folder, checkpoint = tmp_path / "killed" / "init", tmp_path / "killed" / ".init.checkpoint"
    folder.parent.mkdir()
    for write in KILLS:
        process = start(folder) if write is AT_RANDOM else start(folder, write)
        if write is AT_RANDOM:
            time.sleep(generator.uniform(0.05, 0.3))
            process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=LONGEST_WAIT)[0] == ""
        assert process.returncode == -signal.SIGKILL
        check_whole(folder.parent)
    assert checkpoint.is_dir()
    assert any(folder.parent.glob(".init.partial-*"))
    process = start(folder)
    assert process.communicate(timeout=LONGEST_WAIT)[0] == "ends\n"
    assert [path.name for path in folder.parent.iterdir()] == ["init"]
    assert_same_tensors(written_adapter(folder), expected)
    found, whole = load_init(folder), load_init(tmp_path / "whole")
    assert found.manifest.data == whole.manifest.data
    statistics, before = (load_statistics(each.folder, each.manifest) for each in (found, whole))
    for name, layer in before.items():
        assert (statistics[name].weight_grad == layer.weight_grad).all()
        assert (statistics[name].input_second_moment == layer.input_second_moment).all()
