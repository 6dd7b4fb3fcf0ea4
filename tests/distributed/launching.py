"""Starting two processes, and what the tests do with what they leave."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.config import Damping
from lora_da_hf.theory.displacement import Displacement
from lora_da_hf.theory.guidance import build_guidance
from lora_da_hf.theory.kronecker import inverse_output_factor
from lora_da_hf.theory.solve import factorize

TESTS = Path(__file__).parents[1]
TIMEOUT = 900
"""Seconds. The longest run takes 90 on two quiet cores, and over 300 on slow ones that run another beside it."""
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
]


def _settings():
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "distributed")])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(command, **environment):
    """Run a command that starts processes, and end all of them should they hang. Returns what they printed."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **_settings(), **environment},
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
    return output


def launch(script, arguments, folder, **environment):
    """Run a script of this folder in two processes, and return what they printed."""
    output = run([*TORCHRUN, str(TESTS / "distributed" / script), *arguments, str(folder)], **environment)
    if not all((folder / f"done.rank{rank}.json").is_file() for rank in range(2)):
        pytest.fail(output[-4000:])
    return output


_PORTS = itertools.cycle(range(1000))


def meeting_point(processes):
    """Return the variables by which processes that are started apart find each other."""
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}


def free_port():
    """Return a port that nothing uses, and that nobody else gets before the processes are there.

    Each worker of pytest has ports of its own, below those that the system hands out by itself.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + 1000 * (worker % 10) + next(_PORTS)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return port


def start_apart(script, arguments, folder, *, processes=2, survivors=(0, 1), **variables):
    """Run a script of this folder in some processes that are started here, and not by torchrun.

    Torchrun would end the others when one is killed.
    """
    shared = {**_settings(), **meeting_point(processes)}
    for left in folder.glob("done.rank*.json"):  # by processes that were started before
        left.unlink()
    command = [sys.executable, str(TESTS / "distributed" / script), *arguments, str(folder)]
    started = []
    for rank in range(processes):
        environment = {**os.environ, **shared, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"output.rank{rank}.txt").open("w") as output:
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in started:
            process.wait(timeout=max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        pytest.fail(f"the processes hang\n{_outputs(folder)}")
    if not all((folder / f"done.rank{rank}.json").is_file() for rank in survivors[:processes]):
        pytest.fail(_outputs(folder))


def _outputs(folder):
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("output.rank*.txt")))


def result(folder, name, rank):
    return json.loads((folder / f"{name}.rank{rank}.json").read_text())


def stored_statistics(folder):
    stored = load_init(folder)
    return load_statistics(stored.folder, stored.manifest)


def guidance_of(statistics, name, config, report):
    """Return the objective of a basis under the guidance matrix of these statistics."""
    factorized = factorize(statistics, config, layer=name)
    inverse_output, _ = inverse_output_factor(
        statistics.output_grad_second_moment_diag.double(),
        Damping.parse(config.output_damping),
        layer=name,
    )
    displacement = Displacement.of(statistics.weight_grad.double(), inverse_output, factorized)
    divisor = displacement.norm() if config.layer_steps == "equal" else report.step_unit * statistics.num_output_tokens
    guidance = build_guidance(
        displacement,
        inverse_output,
        population_size=report.population_size,
        variance_weight=config.variance_weight,
        normalize_terms=config.normalize_guidance_terms,
    )

    def objective(basis_A):
        basis = basis_A.double()
        return (basis @ guidance.apply(basis.mT)).trace().item() / divisor**2

    return objective
