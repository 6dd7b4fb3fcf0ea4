"""What one of two processes gets that differ in something. Usage: differing_worker.py FOLDER, started by torchrun."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_lora_model
from harness import adapter_weights, collate, make_config, make_learnable_samples
from worker import RANK, write

from lora_da_hf import LoRADAError, initialize_lora_da

SETTINGS = {"num_samples": 7, "search_samples": 1, "batch_size": 2}
OTHERS = {
    "seed": {"seed": 43},
    "num_samples": {"config": {"num_samples": 6}},
    "variance_weight": {"config": {"variance_weight": 2.0}},
    "input_damping": {"config": {"input_damping": 1e-2}},
    "order of the samples": {"samples": slice(8, None, -1)},
    "samples": {"samples": slice(9, 18)},
    "batch_size": {"config": {"batch_size": 3}},
    "adapter": {"rank": 3},
}
"""What the second process has otherwise, by the name that the error must give."""


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, other in OTHERS.items():
        other = other if RANK == 1 else {}
        model = make_lora_model(r=other.get("rank", 4))
        before = adapter_weights(model)
        start = time.perf_counter()
        try:
            initialize_lora_da(
                model,
                make_learnable_samples(40)[other.get("samples", slice(0, 9))],
                config=make_config(**{**SETTINGS, **other.get("config", {})}),
                data_collator=collate,
                seed=other.get("seed", 42),
                progress=False,
            )
            message = None
        except LoRADAError as error:
            message = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        same = all(torch.equal(tensor, before[key]) for key, tensor in adapter_weights(model).items())
        write(folder, name, {"message": message, "seconds": seconds, "adapter_as_before": same})
    write(folder, "done", True)


if __name__ == "__main__":
    main()
