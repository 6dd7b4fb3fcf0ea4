"""What one of two processes does; the tests compare the files that it leaves.

Usage: worker.py SCENARIOS FOLDER, started by torchrun with the tests' folder on the path.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_lora_model, make_tiny_llama
from harness import (
    adapter_weights,
    collate,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    train_from,
)
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lora_da_hf import LoRADATrainer, apply_init, initialize_lora_da
from lora_da_hf.errors import LoRADAError

RANK = int(os.environ.get("RANK", "0"))
SMALL = 350_000  # bytes: several windows


def seven_samples():
    return make_learnable_samples(7)


def seven_config(**overrides):
    settings = {"num_samples": 7, "sample_selection": "head", "step_size": 0.05, "batch_size": 2}
    return make_config(**{**settings, **overrides})


def trainer_samples():
    return make_learnable_samples(31)


def trainer_config(**overrides):
    return make_config(num_samples=13, search_samples=5, batch_size=3, **overrides)


def write(folder, name, value):
    """Write a result so that it is there as a whole or not at all."""
    path = folder / f"{name}.rank{RANK}.json"
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").rename(path)


def write_adapter(folder, name, weights):
    save_file(weights, folder / f"{name}.rank{RANK}.safetensors")


def initialize(folder, name, samples, config, **settings):
    model = make_lora_model()
    report = initialize_lora_da(
        model, samples, config=config, data_collator=collate, output_dir=folder / name, progress=False, **settings
    )
    write_adapter(folder, name, adapter_weights(model))
    write(folder, name, report.to_dict())


def reuse(folder):
    """Start from the initialisations that the test stored."""
    searched = {"samples": trainer_samples(), "data_collator": collate, "batch_size": 3}
    for name, settings in (("reused", {}), ("searched", searched)):
        model = make_lora_model(r=4)
        report = apply_init(model, folder / "stored", progress=False, **settings)
        write_adapter(folder, name, adapter_weights(model))
        write(folder, name, report.to_dict())


def flatten_parameters(folder):
    """Wrap a model in FSDP1 in both of its ways, and note what is left of the adapter and what LoRA-DA says."""
    cpu = torch.device("cpu")
    try:
        FullyShardedDataParallel(make_lora_model(), use_orig_params=False, device_id=cpu)
        joined = None
    except ValueError as error:
        joined = str(error)
    model = FullyShardedDataParallel(make_lora_model(), use_orig_params=True, device_id=cpu)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    try:
        initialize_lora_da(model, seven_samples(), config=seven_config(), progress=False)
        message = None
    except LoRADAError as error:
        message = f"{type(error).__name__}: {error}"
    write(folder, "fsdp1", {"joined": joined, "shapes": shapes, "message": message})


def split_layers(folder):
    """Load a model for tensor parallelism as transformers does, and note what an initialisation says."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
    weight = base.model.layers[0].mlp.gate_proj.weight
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    model = make_lora_model(model=base, target_modules=["gate_proj"])
    try:
        initialize_lora_da(model, seven_samples(), config=seven_config(), progress=False)
        message = None
    except LoRADAError as error:
        message = f"{type(error).__name__}: {error}"
    write(folder, "tensor_parallel", {"shape": list(own.shape), "message": message})


def make_trainer(folder, name, **config):
    return LoRADATrainer(
        model=make_tiny_llama(),
        args=make_args(
            folder / name,
            max_steps=3,
            per_device_train_batch_size=2,
            average_tokens_across_devices=True,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=trainer_samples(),
        data_collator=collate,
        peft_config=make_lora_config(),
        da_config=trainer_config(**config),
    )


def train(folder, name, **config):
    trainer = make_trainer(folder, name, **config)
    start = train_from(trainer)
    write_adapter(folder, f"{name}.start", start.weights)
    write_adapter(folder, f"{name}.end", adapter_weights(trainer.model))
    parameters = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = [n for n, p in trainer.model.named_parameters() if id(p) in parameters]
    write(
        folder,
        name,
        {
            "report": trainer.lora_da_report.to_dict(),
            "log": trainer.state.log_history,
            "optimizer": names,
            "world_size": trainer.args.world_size,
            "wrapped": type(trainer.model_wrapped).__name__,
        },
    )


def main():
    scenarios, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if scenarios != "train":
        dist.init_process_group("gloo")
    if scenarios == "initialize":
        initialize(folder, "shared", seven_samples(), seven_config())
        initialize(folder, "stored", seven_samples(), seven_config(save_statistics=True))
        initialize(folder, "sample_windows", seven_samples(), seven_config(memory_budget=SMALL))
        initialize(folder, "one_sample", seven_samples()[:1], seven_config(save_statistics=True))
    elif scenarios == "reuse":
        reuse(folder)
    elif scenarios == "train":
        train(folder, "trained")
        train(folder, "frozen", freeze_a=True)
    else:
        alone = {"fsdp1": flatten_parameters, "tensor_parallel": split_layers}
        alone[scenarios](folder)
    write(folder, "done", True)


if __name__ == "__main__":
    main()
