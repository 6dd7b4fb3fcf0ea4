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
from launching import meeting_point
from safetensors.torch import load_file

from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init

pytestmark = pytest.mark.slow

LONGEST_WAIT = 60
AT_RANDOM = None
KILLS = (AT_RANDOM, 1, -1, 9, AT_RANDOM, 18, AT_RANDOM, 5, AT_RANDOM, 0)  # else: in the middle of that write
FIRST, SECOND, BOTH = (0,), (1,), (0, 1)
KILLS_OF_TWO = (
    *((AT_RANDOM, FIRST), (1, SECOND), (-1, FIRST), (9, BOTH), (AT_RANDOM, BOTH)),
    *((12, FIRST), (AT_RANDOM, SECOND), (5, SECOND), (AT_RANDOM, BOTH), (0, FIRST)),
)


def launch(folder, *arguments, errors=subprocess.DEVNULL, **variables):
    """Start the worker."""
    tests = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed_worker.py")), str(folder), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def start(folder, *arguments):
    """Start the worker and wait until it is about to begin."""
    process = launch(folder, *arguments)
    assert process.stdout.readline() == "begins\n"
    return process


def start_two(folder, write=AT_RANDOM, dying=()):
    """Start two processes, of which some are to die in a write, and wait until they are about to begin."""
    shared = meeting_point(2)
    started = []
    for rank in range(2):
        arguments = [write] if write is not AT_RANDOM and rank in dying else []
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(launch(folder, *arguments, errors=subprocess.PIPE, **variables))
    for process in started:
        line = process.stdout.readline()
        assert line == "begins\n", process.communicate()[1]
    return started


def check_whole(folder):
    """Verify that every file under its final name can be read as a whole."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        partial = any(".partial" in part or part.startswith(".tmp") for part in parts)  # .tmp: of safetensors itself
        if path.is_file() and not partial and path.suffix != ".lock":
            load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def end_of(process):
    """Return what a process printed since it began, and what it complained of."""
    return process.communicate(timeout=LONGEST_WAIT)


def check_the_same(folder, expected):
    """Verify that an initialisation is alone in its folder, and the same as another to the bit."""
    assert [path.name for path in folder.parent.iterdir()] == ["init"]
    assert_same_tensors(written_adapter(folder), written_adapter(expected))
    found, whole = load_init(folder), load_init(expected)
    assert found.manifest.data == whole.manifest.data
    statistics, before = (load_statistics(each.folder, each.manifest) for each in (found, whole))
    for name, layer in before.items():
        assert (statistics[name].weight_grad == layer.weight_grad).all()
        assert (statistics[name].input_second_moment == layer.input_second_moment).all()


def test_ten_kills_change_no_bit(tmp_path):
    killed_worker.initialize(tmp_path / "whole")
    generator = random.Random(0)
    folder, checkpoint = tmp_path / "killed" / "init", tmp_path / "killed" / "_init.checkpoint"
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
    assert any(folder.parent.glob("_init.partial-*"))
    process = start(folder)
    assert process.communicate(timeout=LONGEST_WAIT)[0] == "ends\n"
    check_the_same(folder, tmp_path / "whole")


@pytest.mark.multi_rank
def test_ten_kills_of_either_or_both_of_two_processes_change_no_bit(tmp_path):
    for process in start_two(tmp_path / "whole" / "init"):
        assert end_of(process)[0] == "ends\n"
    generator = random.Random(0)
    folder, checkpoint = tmp_path / "killed" / "init", tmp_path / "killed" / "_init.checkpoint"
    folder.parent.mkdir()
    for write, dying in KILLS_OF_TWO:
        started = start_two(folder, write, dying)
        if write is AT_RANDOM:
            time.sleep(generator.uniform(0.05, 0.3))
            for rank in dying:
                started[rank].send_signal(signal.SIGKILL)
        for rank, process in enumerate(started):
            output, errors = end_of(process)
            assert output == ""
            if rank not in dying:
                assert process.returncode != 0
                assert "PeerGone: Another process is gone" in errors
            elif write is AT_RANDOM:
                assert process.returncode == -signal.SIGKILL
        assert -signal.SIGKILL in [process.returncode for process in started]
        check_whole(folder.parent)
    assert checkpoint.is_dir()
    for process in start_two(folder):
        assert end_of(process)[0] == "ends\n"
    check_the_same(folder, tmp_path / "whole" / "init")
