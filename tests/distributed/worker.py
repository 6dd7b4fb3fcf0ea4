"""What one of two processes without a trainer does; the tests compare the files that it leaves.

Usage: worker.py FOLDER, started by torchrun with the tests' folders on the path.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_lora_model
from harness import adapter_weights, collate, initialize, make_learnable_samples
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lora_da_hf import apply_init

PROCESS = int(os.environ.get("RANK", "0"))
SMALL = 300_000
"""Bytes, for which the layers are collected in several windows."""
SEVEN = {"num_samples": 7, "step_size": 0.05, "search_samples": 0, "batch_size": 2, "save_statistics": True}
"""Settings for uneven shares: four samples and three, of which the last is a batch of its own."""
CELLS = {"plain": (7, {}), "windows": (7, {"memory_budget": SMALL}), "one sample": (1, {})}
"""Numbers of samples and settings of what is compared with one process."""
DIFFERING = {
    "seed": {"seed": 43},
    "num_samples": {"num_samples": 6},
    "variance_weight": {"variance_weight": 2.0},
    "input_damping": {"input_damping": 1e-2},
    "order of the samples": {"samples": slice(8, None, -1)},
    "samples": {"samples": slice(9, 18)},
    "kind of samples": {"stream": True},
    "batch_size": {"batch_size": 3},
    "adapter": {"r": 3},
}
"""What the second process has otherwise, by the name that the error must give."""


class Stream:
    """Samples without positions."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def write(folder, name, value):
    """Write a result so that it is there as a whole or not at all."""
    path = folder / f"{name}.process{PROCESS}.json"
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").rename(path)


def finish(folder, name, model, report):
    save_file(adapter_weights(model), folder / f"{name}.process{PROCESS}.safetensors")
    write(folder, name, report.to_dict())


def attempt(folder, name, model, do):
    """Do what must be refused, and note what this process gets, and whether its adapter is as it was."""
    before = {key: tensor.clone() for key, tensor in adapter_weights(model).items()}
    start = time.perf_counter()
    try:
        do(model)
        message = None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    same = all(torch.equal(tensor, before[key]) for key, tensor in adapter_weights(model).items())
    seconds = time.perf_counter() - start
    write(folder, name, {"message": message, "seconds": seconds, "adapter_as_before": same})


def differ(folder):
    for name, other in DIFFERING.items():
        settings = {"num_samples": 7, "search_samples": 1, "batch_size": 2, "seed": 42, **(other if PROCESS else {})}
        samples = make_learnable_samples(40)[settings.pop("samples", slice(0, 9))]
        samples = Stream(samples) if settings.pop("stream", False) else samples
        model = make_lora_model(r=settings.pop("r", 4))
        attempt(folder, name, model, lambda it, given=(samples, settings): initialize(it, given[0], **given[1]))
    attempt(folder, "stored", make_lora_model(r=4), lambda it: apply_init(it, folder / f"stored_{PROCESS}"))


def use_stored(folder):
    searched = {
        "samples": make_learnable_samples(31),
        "step_size": "line_search",
        "data_collator": collate,
        "batch_size": 3,
    }
    for name, settings in (("used", {}), ("searched", searched)):
        model = make_lora_model(r=4)
        finish(folder, name, model, apply_init(model, folder / "stored_0", progress=False, **settings))


def split(folder):
    """Split a model as FSDP1 and tensor parallelism do, and note what is left of a layer and what LoRA-DA says."""
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(make_lora_model(), use_orig_params=True, device_id=cpu)
    dimensions = {p.dim() for name, p in model.named_parameters() if "lora_A" in name}
    assert dimensions == {1}  # no adapter matrix is left to be written
    attempt(folder, "FSDP1", model, lambda it: initialize(it, make_learnable_samples(7), **SEVEN))
    base = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
    weight = base.model.layers[0].mlp.gate_proj.weight
    assert (weight.to_local() if isinstance(weight, DTensor) else weight).shape == (40, 48)  # half of the rows
    model = make_lora_model(model=base, target_modules=["gate_proj"])
    attempt(folder, "tensor parallelism", model, lambda it: initialize(it, make_learnable_samples(7), **SEVEN))


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, (count, settings) in CELLS.items():
        model = make_lora_model()
        report = initialize(model, make_learnable_samples(count), folder / name, **SEVEN, **settings)
        finish(folder, name, model, report)
    use_stored(folder)
    differ(folder)
    split(folder)
    write(folder, "done", True)


if __name__ == "__main__":
    main()
