"""What one of two processes does under one way to share a model's training, for all of its cells.

Usage: strategy_worker.py STRATEGY [CELL ...] FOLDER, started by torchrun with the tests' folders on the path and
DS_ACCELERATOR=cpu. The tests compare what it leaves. Without cells it does all but those that kill a process.
"""

import gc
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers.training_args
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import make_tiny_llama
from datasets import Dataset, IterableDataset
from harness import collate, make_args, make_config, make_learnable_samples, make_lora_config, make_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback
from worker import SMALL, write

from lora_da_hf import LoRADACallback, LoRADATrainer

CONFIGS = Path(__file__).parents[2] / "scripts" / "deepspeed"
RATE = 1e-12  # a step that changes nothing
CHECKPOINTING = {"plain": None, "reentrant": True, "not_reentrant": False}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PARTITIONED = ("zero3", "fsdp2")
QUANTISED = ("ddp", "zero1", "zero2")
LAYERS_TO_WRAP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def cells(strategy):
    """Name every cell, with what it asks for beyond the ordinary."""
    found = {f"{c}_{d}": {"checkpointing": CHECKPOINTING[c], "dtype": d} for d in DTYPES for c in CHECKPOINTING}
    found["one_sample_fp32"] = {"config": {"num_samples": 1}, "checkpointing": False}
    found["searched_fp32"] = {"config": {"step_size": "line_search", "num_samples": 13, "batch_size": 1}}
    if strategy.startswith("zero"):
        found["offload_bf16"] = {"engine": {"offload_optimizer": {"device": "cpu"}}, "dtype": "bf16"}
    if strategy == "zero3":
        found["persistent_fp32"] = {"engine": {"stage3_param_persistence_threshold": 100_000}}
        found["zero_init_fp32"] = {"load": True}
    if strategy in ("ddp", "fsdp2"):
        found["dora_fp32"] = {"lora": {"use_dora": True}}
    if strategy in PARTITIONED:  # where two processes search on 2 samples and on 1
        settings = {"step_size": "line_search", "num_samples": 13, "batch_size": 2}
        found["searched_in_batches_fp32"] = {"config": settings}
        for name, checkpointing in CHECKPOINTING.items():
            found[f"windows_{name}_fp32"] = {"config": {"memory_budget": SMALL}, "checkpointing": checkpointing}
    if strategy == "fsdp2":
        for name in CHECKPOINTING:  # where accelerate has the outputs cast
            found[f"{name}_bf16"]["config"] = {"step_size": "line_search", "num_samples": 13}
        found["saved_fp32"] = {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}
        found["not_resharded_fp32"] = {"engine": {"reshard_after_forward": False}}
    return found


def make_base(dtype="fp32"):
    """Make a model with sizes that two processes do not divide."""
    return make_tiny_llama(dtype=DTYPES[dtype], intermediate_size=81)


def samples():
    return make_learnable_samples(31)


def lora_config(**overrides):
    return make_lora_config(r=3, lora_alpha=6, **overrides)


def da_config(**overrides):
    """Take uneven shares: 4 and 3 samples of 7, in 2 batches and 1."""
    settings = {"num_samples": 7, "batch_size": 3, "step_size": 0.05, "sample_selection": "head"}
    return make_config(**{**settings, "save_statistics": True, **overrides})


def zero_config(stage, dtype, changes):
    config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    config["bf16"]["enabled"], config["fp16"]["enabled"] = dtype == "bf16", False
    if stage == "3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["zero_optimization"] |= changes
    return config


def strategy_args(strategy, dtype, engine):
    """Make accelerate believe in a strategy on the CPU, and return the arguments that ask for it."""
    kind = {"z": DistributedType.DEEPSPEED, "f": DistributedType.MULTI_GPU, "d": DistributedType.MULTI_CPU}[strategy[0]]
    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._shared_state["distributed_type"] = kind
    if strategy == "ddp":
        return {"ddp_find_unused_parameters": False}
    if strategy == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, **LAYERS_TO_WRAP, **engine}}
    return {"deepspeed": zero_config(strategy[-1], dtype, engine)}


def training_args(folder, strategy, *, dtype="fp32", engine=None, checkpointing=None, **overrides):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "bf16": dtype == "bf16",
        "accelerator_config": {"use_configured_state": True},
        "gradient_checkpointing": checkpointing is not None,
        "gradient_checkpointing_kwargs": None if checkpointing is None else {"use_reentrant": checkpointing},
        **strategy_args(strategy, dtype, engine or {}),
    }
    return make_args(folder, **{**settings, **overrides})


def trained(model):
    stored = {"_vector.default.weight": "_vector", ".modules_to_save.default.": ".", ".default.": "."}
    names = {name: name for name, p in model.named_parameters() if p.requires_grad}
    for part, replaced in stored.items():
        names = {name: short.replace(part, replaced) for name, short in names.items()}
    return [(names[name], p) for name, p in model.named_parameters() if p.requires_grad]


def whole(parameter):
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def in_parts(model):
    """Tell whether this process has no more than a part of every parameter, or leaves that to DeepSpeed."""
    return all(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


class Watch(TrainerCallback):
    """Notes the gradients that are there before the first step, those of each step, and the weights after the first.

    And whether the parameters are in parts.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.left_behind = []
        self.grads = []
        self.start = self.weights = self.masters = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.in_parts = in_parts(model)
        self.start = {name: whole(p) for name, p in trained(model)}
        self.left_behind = [name for name, p in model.named_parameters() if p.grad is not None]
        if args.deepspeed:
            self._watch_engine(self.trainer.model_wrapped, model)

    def _watch_engine(self, engine, model):
        """Look at the gradients before each step of a DeepSpeed engine, which calls no callback."""
        from deepspeed.utils import safe_get_full_grad

        self.left_behind += [f"averaged {key}" for key, value in engine.optimizer.averaged_gradients.items() if value]
        step = engine.step

        def watched(*args, **kwargs):
            self.grads.append({name: safe_get_full_grad(p).float().clone() for name, p in trained(model)})
            return step(*args, **kwargs)

        engine.step = watched

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not args.deepspeed:
            self.grads.append({name: whole(p.grad).float() for name, p in trained(model)})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.weights = {name: whole(p) for name, p in trained(model)}
            self.masters = self.weights
            if args.deepspeed:
                from deepspeed.utils import safe_get_full_fp32_param

                self.masters = {name: safe_get_full_fp32_param(p).clone() for name, p in trained(model)}


def train(trainer):
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    return watch


def largest_difference(found, expected):
    """Return the largest difference of two sets of tensors, relative to the norm of each."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    differences = []
    for name, tensor in expected.items():
        norm = tensor.double().norm().clamp_min(1e-30)
        differences.append(((found[name].double() - tensor.double()).norm() / norm).item())
    return max(differences)


def run_cell(folder, strategy, name, *, config=None, lora=None, load=False, dtype="fp32", **settings):
    base = None if load else make_base(dtype)
    args = training_args(folder / name, strategy, dtype=dtype, **settings)
    if load:  # the arguments above make from_pretrained build the model under zero.Init
        base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    loaded_in_parts = in_parts(base) and not any(p.numel() for p in base.parameters())
    data = {"train_dataset": samples(), "data_collator": collate}
    trainer = LoRADATrainer(
        model=base, args=args, peft_config=lora_config(**lora or {}), da_config=da_config(**config or {}), **data
    )
    watch = train(trainer)
    report = trainer.lora_da_report.to_dict()
    written = load_file(folder / name / "lora_da" / "adapter_model.safetensors")
    wrapped = type(trainer.model_wrapped).__name__
    del trainer, base
    gc.collect()

    args = training_args(folder / f"{name}_loaded", strategy, dtype=dtype, **settings)
    model = PeftModel.from_pretrained(make_base(dtype), folder / name / "lora_da", is_trainable=True)
    control = train(Trainer(model=model, args=args, **data))
    write(
        folder,
        name,
        {
            "wrapped": wrapped,
            "loaded_in_parts": loaded_in_parts,
            "in_parts": watch.in_parts,
            "report": report,
            "left_behind": watch.left_behind,
            "weights": largest_difference(watch.weights, written),
            "masters": largest_difference(watch.masters, written),
            "grads": [largest_difference(a, b) for a, b in zip(watch.grads, control.grads, strict=True)],
        },
    )


def stream(folder, strategy):
    """Train on a stream, of which the first process reads the head for both."""
    trainer = LoRADATrainer(
        model=make_base(),
        args=training_args(
            folder / "stream",
            strategy,
            # rows of different lengths cannot be dispatched by one process: the trainer's own condition
            accelerator_config={"use_configured_state": True, "dispatch_batches": False},
        ),
        peft_config=lora_config(),
        da_config=da_config(population_size=31),
        train_dataset=IterableDataset.from_generator(lambda: iter(samples())),
        data_collator=collate,
    )
    train(trainer)
    write(folder, "stream", trainer.lora_da_report.to_dict())


class Greedy(LoRADATrainer):
    """Has no memory for more than two samples in a training step."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def find_batch_size(folder, strategy):
    """Have the trainer start over with a smaller batch, and note how often it was initialised and where it started."""
    trainer = Greedy(
        model=make_base(),
        args=training_args(
            folder / "batch_size", strategy, auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=1
        ),
        peft_config=lora_config(),
        da_config=da_config(),
        train_dataset=samples(),
        data_collator=collate,
    )
    watch = train(trainer)
    written = load_file(folder / "batch_size" / "lora_da" / "adapter_model.safetensors")
    found = {
        "batch_size": trainer.state.train_batch_size,
        "initializations": sum("lora_da_step_size" in entry for entry in trainer.state.log_history),
        "weights": largest_difference(watch.weights, written),
    }
    write(folder, "batch_size", found)


def sft(folder, strategy):
    """Train with TRL's trainer, which takes the callback."""
    import trl

    callback = LoRADACallback(da_config())
    args = training_args(folder / "sft", strategy, kind=trl.SFTConfig, checkpointing=False)
    trainer = trl.SFTTrainer(
        model=make_base(),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": sample["input_ids"]} for sample in samples()]),
        processing_class=make_tokenizer(),
        peft_config=lora_config(),
        callbacks=[callback],
    )
    watch = train(trainer)
    written = load_file(folder / "sft" / "lora_da" / "adapter_model.safetensors")
    write(
        folder,
        "sft",
        {
            "wrapped": type(trainer.model_wrapped).__name__,
            "report": callback.report.to_dict(),
            "weights": largest_difference(watch.weights, written),
            "masters": largest_difference(watch.masters, written),
        },
    )


def quantised_base(folder):
    """Load the wider base in 4-bit, as QLoRA does."""
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return AutoModelForCausalLM.from_pretrained(
        folder / "wide_base",
        quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **kind),
        device_map={"": "cpu"},
        dtype=torch.float32,
        attn_implementation="eager",
    )


def qlora(folder, strategy):
    """Train an adapter of a base in 4-bit."""
    trainer = LoRADATrainer(
        model=quantised_base(folder),
        args=training_args(folder / "qlora", strategy),
        peft_config=lora_config(),
        da_config=da_config(),
        train_dataset=samples(),
        data_collator=collate,
    )
    watch = train(trainer)
    written = load_file(folder / "qlora" / "lora_da" / "adapter_model.safetensors")
    found = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "layers": len(trainer.lora_da_report.layers),
        "weights": largest_difference(watch.weights, written),
        "masters": largest_difference(watch.masters, written),
    }
    write(folder, "qlora", found)


def again(folder, strategy):
    """Start the first cell once more, in its folder, and note what was done and where it started."""
    trainer = LoRADATrainer(
        model=make_base(),
        args=training_args(folder / "plain_fp32", strategy),
        peft_config=lora_config(),
        da_config=da_config(),
        train_dataset=samples(),
        data_collator=collate,
    )
    watch = train(trainer)
    written = load_file(folder / "plain_fp32" / "lora_da" / "adapter_model.safetensors")
    report = trainer.lora_da_report
    found = {
        "stages": sorted(report.seconds),
        "note": report.notes[-1],
        "weights": largest_difference(watch.weights, written),
        "masters": largest_difference(watch.masters, written),
    }
    write(folder, "again", found)


def resume(folder, strategy):
    """Stop after a step, go on from the checkpoint, and note whether the adapter is the checkpoint's."""

    def make_trainer(steps):
        args = training_args(folder / "resume", strategy, max_steps=steps, save_strategy="steps", save_steps=1)
        return LoRADATrainer(
            model=make_base(),
            args=args,
            peft_config=lora_config(),
            da_config=da_config(),
            train_dataset=samples(),
            data_collator=collate,
        )

    manifest = folder / "resume" / "lora_da" / "lora_da_manifest.json"
    first = make_trainer(1)
    watch = train(first)
    written = manifest.stat().st_mtime_ns
    second = make_trainer(2)
    watch_second = Watch(second)
    second.add_callback(watch_second)
    second.train(resume_from_checkpoint=str(folder / "resume" / "checkpoint-1"))
    write(
        folder,
        "resume",
        {
            "steps": second.state.global_step,
            "start": largest_difference(watch_second.start, watch.weights),
            "layers_recalled": len(second.lora_da_report.layers),
            "untouched": manifest.stat().st_mtime_ns == written,
        },
    )


def scenarios(strategy):
    """List what is done once for a strategy."""
    found = [again, resume]
    if strategy == "ddp":
        found += [stream, find_batch_size]
    if strategy in QUANTISED and importlib.util.find_spec("bitsandbytes"):
        found.append(qlora)
    if strategy in ("zero2", "zero3") and importlib.util.find_spec("trl"):
        found.append(sft)
    return found


def main():
    strategy, *only, folder = sys.argv[1:]
    folder = Path(folder)
    torch.set_num_threads(1)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # the arguments ask for a GPU's
    PartialState(cpu=True)
    if strategy.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if PartialState().is_main_process:
        make_base().save_pretrained(folder / "base")
        make_tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "wide_base")
    PartialState().wait_for_everyone()
    for name, settings in cells(strategy).items():
        if not only or name in only:
            run_cell(folder, strategy, name, **settings)
    for scenario in scenarios(strategy):
        if not only or scenario.__name__ in only:
            scenario(folder, strategy)
    write(folder, "done", True)


if __name__ == "__main__":
    main()
