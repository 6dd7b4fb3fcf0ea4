"""Initialises a tiny adapter in a folder, again and again after kills; the test looks at the folder alone.

Usage: killed_worker.py FOLDER [NUMBER], with torchrun's variables if it is one of several processes. It prints a line
once it is about to begin, and with a number it kills itself when half of the NUMBER-th file of its checkpoints is
written; with -1, half of its first file of statistics; with 0, half of a file of the initialisation itself.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_lora_model
from harness import collate, make_config, make_learnable_samples

import lora_da_hf.artifacts.checkpoint
import lora_da_hf.artifacts.statistics_store
import lora_da_hf.artifacts.store
from lora_da_hf import initialize_lora_da

LEAST_WRITE_SECONDS = 0.02  # a kill at random finds about as much left to do on a fast machine as on a slow one


def take_time(module):
    """Make each call of the module's `write_tensors` take no less than a known time."""
    write_tensors = module.write_tensors

    def slow_write_tensors(*arguments):
        time.sleep(LEAST_WRITE_SECONDS)
        write_tensors(*arguments)

    module.write_tensors = slow_write_tensors


def die_in_the_middle(module, number):
    """Make the NUMBER-th call of the module's `write_tensors` write half of the file and kill the process."""
    write_tensors, calls = module.write_tensors, itertools.count(1)

    def dying_write_tensors(path, *arguments):
        write_tensors(path, *arguments)
        if next(calls) == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    module.write_tensors = dying_write_tensors


def initialize(folder):
    """Run a slow enough initialisation: 32 single samples a process, four windows, sums written after each batch."""
    samples = 32 * int(os.environ.get("WORLD_SIZE", "1"))
    config = make_config(
        num_samples=samples, batch_size=1, memory_budget=350_000, statistics_save_steps=1, save_statistics=True
    )
    initialize_lora_da(
        make_lora_model(),
        make_learnable_samples(samples + 16),
        config=config,
        data_collator=collate,
        output_dir=folder,
        progress=False,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    take_time(lora_da_hf.artifacts.checkpoint)
    if len(sys.argv) > 2:
        number = int(sys.argv[2])
        modules = lora_da_hf.artifacts.store, lora_da_hf.artifacts.checkpoint, lora_da_hf.artifacts.statistics_store
        die_in_the_middle(modules[0 if number == 0 else 1 if number > 0 else 2], abs(number) or 1)
    print("begins", flush=True)
    initialize(Path(sys.argv[1]))
    print("ends", flush=True)
    if "WORLD_SIZE" in os.environ:
        os._exit(0)  # gloo sometimes aborts in its teardown
