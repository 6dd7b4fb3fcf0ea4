"""What one of two processes does; the tests compare the files that it leaves.

Usage: worker.py SCENARIOS FOLDER, started by torchrun with the tests' folder on the path.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_lora_model, make_tiny_llama, make_token_samples
from harness import (
    CountedOperations,
    adapter_weights,
    collate,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    measured_tensors,
    train_from,
)
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lora_da_hf.pipeline.run
from lora_da_hf import LoRADATrainer, apply_init, initialize_lora_da
from lora_da_hf.errors import LoRADAError, NonFiniteError
from lora_da_hf.losses import model_loss

RANK = int(os.environ.get("RANK", "0"))
SMALL = 350_000  # bytes: several windows
BUDGET = 5000  # parameters
MARK = 95  # a token that no other sample has


def seven_samples():
    return make_learnable_samples(7)


def seven_config(**overrides):
    settings = {"num_samples": 7, "sample_selection": "head", "step_size": 0.05, "batch_size": 2}
    return make_config(**{**settings, **overrides})


def long_samples():
    return make_token_samples(160, min_length=40, max_length=60)


def model_of_blocks(count, width):
    model = make_tiny_llama(hidden_size=width, intermediate_size=width, num_hidden_layers=count)
    return make_lora_model(model=model, r=1)


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


def fail(folder, name, samples=None, **settings):
    """Run an initialisation that fails on one process, and say what each of them got."""
    model = make_lora_model()
    before = adapter_weights(model)
    samples = seven_samples() if samples is None else samples
    try:
        initialize_lora_da(model, samples, config=seven_config(), progress=False, **settings)
        message = None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    after = adapter_weights(model)
    same = all(torch.equal(after[key], before[key]) for key in before)
    write(folder, name, {"message": message, "adapter_as_before": same})


def nan_on_one_process(folder):
    samples = [*seven_samples()]
    ids = samples[3]["input_ids"]  # of the second process's share, and not one that the probe looks at
    samples[3] = {**samples[3], "input_ids": [MARK, *ids[1:]]}

    def loss(model, batch, num_items):
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        value = model(**batch, **extra).loss
        return value * float("nan") if (batch["input_ids"] == MARK).any() else value

    fail(folder, "nan", samples, compute_loss=loss)


def failing_solve(folder):
    """Fail in the solve of the second process only."""
    import lora_da_hf.pipeline.solve as module

    original = module.solve_group

    def broken(*args, **kwargs):
        if RANK == 1:
            raise NonFiniteError("broken on purpose")
        return original(*args, **kwargs)

    module.solve_group = broken
    try:
        fail(folder, "failing_solve")
    finally:
        module.solve_group = original


def break_reduction(folder):
    """Fail in the second process in the middle of the reduction of the sums, of which it cannot tell the first."""
    import lora_da_hf.distributed.reduce as module

    def broken(moment):
        raise MemoryError("broken on purpose")

    if RANK == 1:
        module.pack_upper = broken
    fail(folder, "failing_reduction")


def failing_save(folder):
    """Fail when the first process writes files, which the second does not."""
    original = lora_da_hf.pipeline.run.save_init

    def broken(*args, **kwargs):
        raise OSError("no space left on purpose")

    lora_da_hf.pipeline.run.save_init = broken
    try:
        fail(folder, "failing_save", output_dir=folder / "failing_save")
    finally:
        lora_da_hf.pipeline.run.save_init = original


def reuse(folder):
    """Start from the initialisations that the test stored."""
    searched = {"samples": trainer_samples(), "data_collator": collate, "batch_size": 3}
    for name, settings in (("reused", {}), ("searched", searched)):
        model = make_lora_model(r=4)
        report = apply_init(model, folder / "stored", progress=False, **settings)
        write_adapter(folder, name, adapter_weights(model))
        write(folder, name, report.to_dict())
    for name, init in (("different", f"of_rank_{RANK}"), ("missing", "stored" if RANK else "nowhere")):
        model = make_lora_model(r=4)
        before = adapter_weights(model)
        try:
            apply_init(model, folder / init)
            message = None
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        after = adapter_weights(model)
        same = all(torch.equal(after[key], before[key]) for key in before)
        write(folder, name, {"message": message, "adapter_as_before": same})


class Dying:
    """A loss that kills its process at the n-th batch with a gradient, and counts them."""

    def __init__(self, at=None):
        self.at = at
        self.count = 0

    def __call__(self, model, batch, num_items_in_batch=None):
        if torch.is_grad_enabled():
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
        return model_loss(model, batch, num_items_in_batch)


def saving_config(**overrides):
    return seven_config(batch_size=1, statistics_save_steps=1, **overrides)


def lose_a_process(folder):
    """Kill the second process in the pass, with its third batch; the first one says what it got."""
    initialize(folder, "whole", seven_samples(), saving_config())
    loss = Dying(3 if RANK == 1 else None)
    start = time.perf_counter()
    try:
        initialize(folder, "killed", seven_samples(), saving_config(), compute_loss=loss)
    except LoRADAError as error:
        message = f"{type(error).__name__}: {error}"
        write(folder, "lost", {"message": message, "seconds": time.perf_counter() - start})


def take_up(folder):
    """Start the same again, all processes of it."""
    loss = Dying()
    initialize(folder, "killed", seven_samples(), saving_config(), compute_loss=loss)
    write(folder, "taken_up", loss.count)


@contextlib.contextmanager
def marked_collectives(operations):
    """Note the count of operations of this process at the beginning of each collective, and at the end."""
    marks = [0]
    originals = {name: getattr(dist, name) for name in ("reduce", "broadcast", "all_gather_object")}

    def marking(original):
        def call(*args, **kwargs):
            marks.append(operations.total)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, marking(original))
    try:
        yield marks
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    marks.append(operations.total)


def measure(folder):
    """Measure what sharing the samples saves in operations, and sharing the layers in memory of tensors."""
    settings = {"step_size": 0.05, "search_samples": 0}
    config = make_config(num_samples=160, batch_size=4, schedule="samples", **settings)
    model = model_of_blocks(6, width=256)
    with CountedOperations() as operations, marked_collectives(operations) as marks:
        initialize_lora_da(model, long_samples(), config=config, progress=False)
    model = model_of_blocks(24, width=256)
    config = make_config(num_samples=3, batch_size=1, schedule="layers", **settings)
    with measured_tensors() as peak:
        initialize_lora_da(model, seven_samples(), config=config, progress=False)
    write(folder, "measured", {"operations": marks, "peak": peak[0]})


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
        initialize(folder, "drawn_labels", seven_samples(), seven_config(fisher="sampled"))
        initialize(folder, "layers", seven_samples(), seven_config(schedule="layers"))
        initialize(folder, "layer_windows", seven_samples(), seven_config(schedule="layers", memory_budget=SMALL))
        initialize(folder, "sample_windows", seven_samples(), seven_config(schedule="samples", memory_budget=SMALL))
        initialize(folder, "chosen_windows", seven_samples(), seven_config(memory_budget=SMALL))
        initialize(folder, "budget", seven_samples(), seven_config(schedule="layers", rank_budget=BUDGET))
        initialize(folder, "one_sample", seven_samples()[:1], seven_config(save_statistics=True))
        nan_on_one_process(folder)
        failing_solve(folder)
        failing_save(folder)
        initialize(folder, "after_failures", seven_samples(), seven_config())
    elif scenarios == "reuse":
        reuse(folder)
    elif scenarios == "train":
        train(folder, "trained")
        train(folder, "frozen", freeze_a=True)
        train(folder, "budget", rank_budget=BUDGET)
    else:
        alone = {"lose": lose_a_process, "take_up": take_up, "measure": measure, "break_reduction": break_reduction}
        alone |= {"fsdp1": flatten_parameters, "tensor_parallel": split_layers}
        alone[scenarios](folder)
    write(folder, "done", True)
    if scenarios == "break_reduction":
        os._exit(0)  # the other waits for this one


if __name__ == "__main__":
    main()
