"""What one of two processes does under one way to share a model's training: every cell of a table, once.

Usage: strategy_worker.py STRATEGY [CELL ...] FOLDER, started by torchrun with the tests' folders on the path and
DS_ACCELERATOR=cpu. The tests compare what it leaves.
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
from harness import (
    collate,
    collate_classes,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    make_tokenizer,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)
from worker import PROCESS, SMALL, write

from lora_da_hf import LoRADACallback, LoRADATrainer

CONFIGS = Path(__file__).parents[2] / "scripts" / "deepspeed"
CHECKPOINTING = {"plain": None, "reentrant": True, "not_reentrant": False}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PARTITIONED = ("zero3", "fsdp2")
SEARCHED = {"step_size": "line_search", "num_samples": 13}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


def cells(strategy):
    """Return what each cell that is compared with one process asks for beyond the ordinary."""
    found = {f"{c}_{d}": {"checkpointing": CHECKPOINTING[c], "dtype": d} for d in DTYPES for c in CHECKPOINTING}
    found["one_sample_fp32"] = {"config": {"num_samples": 1}, "checkpointing": False}
    found["searched_fp32"] = {"config": {**SEARCHED, "batch_size": 1}}
    found |= {f"{start}_fp32": {"config": {"start": start}} for start in ("gradient", "whitened_gradient", "inputs")}
    if strategy.startswith("zero"):
        found["offload_bf16"] = {"engine": {"offload_optimizer": {"device": "cpu"}}, "dtype": "bf16"}
    if strategy == "zero3":
        found["persistent_fp32"] = {"engine": {"stage3_param_persistence_threshold": 100_000}}
        found["zero_init_fp32"] = {"base": "loaded"}
    if strategy in ("ddp", "fsdp2"):
        found["dora_fp32"] = {"lora": {"use_dora": True}}
    if strategy in PARTITIONED:  # where two processes search on 2 samples and on 1
        found["searched_in_batches_fp32"] = {"config": {**SEARCHED, "batch_size": 2}}
        for name, checkpointing in CHECKPOINTING.items():
            found[f"windows_{name}_fp32"] = {"config": {"memory_budget": SMALL}, "checkpointing": checkpointing}
    if strategy == "fsdp2":
        for name in CHECKPOINTING:  # where accelerate has the outputs cast
            found[f"{name}_bf16"]["config"] = SEARCHED
        found["saved_fp32"] = {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}
        found["not_resharded_fp32"] = {"engine": {"reshard_after_forward": False}}
    return found


def others(strategy):
    """Return the cells that are not compared with a run that loads the adapter."""
    found = {"again": {"place": "plain_fp32"}, "head": {"kind": "classes"}}  # the first finds what is there
    if strategy == "ddp":
        # rows of different lengths cannot be dispatched by one process: the trainer's own condition
        accelerator = {"use_configured_state": True, "dispatch_batches": False}
        found["stream"] = {"kind": "stream", "accelerator_config": accelerator}
        found["greedy"] = {
            "kind": "greedy",
            "auto_find_batch_size": True,
            "per_device_train_batch_size": 4,
            "max_steps": 1,
        }
        found["frozen"] = {"config": {"freeze_a": True}, "learning_rate": 1e-3}
    if strategy not in PARTITIONED and installed("bitsandbytes"):
        found["quantised"] = {"base": "quantised"}
    if strategy in ("zero2", "zero3") and installed("trl"):
        found["sft"] = {"kind": "sft", "checkpointing": False}
    return found


def make_base(dtype="fp32"):
    """Make a model with sizes that two processes do not divide."""
    return make_tiny_llama(dtype=DTYPES[dtype], intermediate_size=81)


def load_base(folder, kind):
    if kind == "loaded":
        return AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(
        folder / "wide_base",
        quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **NF4),
        device_map={"": "cpu"},
        dtype=torch.float32,
        attn_implementation="eager",
    )


def samples():
    return make_learnable_samples(31)


def lora_config(**overrides):
    return make_lora_config(r=3, lora_alpha=6, **overrides)


def da_config(**overrides):
    """Take uneven shares: 4 and 3 samples of 7, in 2 batches and 1."""
    settings = {"num_samples": 7, "batch_size": 3, "step_size": 0.05, "save_statistics": True}
    return make_config(**{**settings, **overrides})


def strategy_args(strategy, dtype, engine):
    """Make accelerate believe in a strategy on the CPU, and return the arguments that ask for it."""
    kind = {"z": DistributedType.DEEPSPEED, "f": DistributedType.MULTI_GPU, "d": DistributedType.MULTI_CPU}[strategy[0]]
    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._shared_state["distributed_type"] = kind
    if strategy == "ddp":
        return {"ddp_find_unused_parameters": False}
    if strategy == "fsdp2":
        wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"fsdp": True, "fsdp_config": {"version": 2, **wrapped, **engine}}
    config = json.loads((CONFIGS / f"{strategy}.json").read_text())
    config["bf16"]["enabled"], config["fp16"]["enabled"] = dtype == "bf16", False
    if strategy == "zero3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["zero_optimization"] |= engine
    return {"deepspeed": config}


def training_args(folder, strategy, *, dtype="fp32", engine=None, checkpointing=None, **overrides):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-12,  # a step that changes nothing
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
            self.weights = self.masters = {name: whole(p) for name, p in trained(model)}
            if args.deepspeed:
                from deepspeed.utils import safe_get_full_fp32_param

                self.masters = {name: safe_get_full_fp32_param(p).clone() for name, p in trained(model)}


def train(trainer, **settings):
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train(**settings)
    return watch


def largest_difference(found, expected):
    """Return the largest difference of two sets of tensors, relative to the norm of each."""
    assert set(found) <= set(expected), set(found) ^ set(expected)
    differences = [
        (tensor.double() - expected[name].double()).norm() / expected[name].double().norm().clamp_min(1e-30)
        for name, tensor in found.items()
    ]
    return max(differences).item()


class Greedy(LoRADATrainer):
    """Has no memory for more than two samples in a training step."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def make_classifier():
    """Make a model with a new head, the same each time."""
    torch.manual_seed(0)
    config = make_base().config
    config.num_labels, config.pad_token_id = 3, 0
    return LlamaForSequenceClassification(config)


def classes():
    return [{**sample, "labels": sample["input_ids"][-1] % 3} for sample in make_learnable_samples(120)]


def make_trainer(folder, strategy, *, config=None, lora=None, base=None, kind=None, dtype="fp32", **settings):
    """Make a trainer of a cell, and return what has its report, too."""
    model = make_classifier() if kind == "classes" else None if base else make_base(dtype)
    data = {"train_dataset": samples(), "data_collator": collate}
    if kind == "sft":
        import trl

        callback = LoRADACallback(da_config(**config or {}))
        data = {
            "train_dataset": Dataset.from_list([{"input_ids": sample["input_ids"]} for sample in samples()]),
            "processing_class": make_tokenizer(),
        }
        args = training_args(folder, strategy, dtype=dtype, kind=trl.SFTConfig, **settings)
        return trl.SFTTrainer(model=model, args=args, peft_config=lora_config(), callbacks=[callback], **data), callback
    args = training_args(folder, strategy, dtype=dtype, **settings)
    if base:  # the arguments make from_pretrained build the model under zero.Init
        model = load_base(folder.parent, base)
    if kind == "classes":
        lora = {"task_type": "SEQ_CLS"}
        data = {"train_dataset": classes(), "data_collator": collate_classes}
    if kind == "stream":
        data["train_dataset"] = IterableDataset.from_generator(lambda: iter(samples()))
    trainer = (Greedy if kind == "greedy" else LoRADATrainer)(
        model=model, args=args, peft_config=lora_config(**lora or {}), da_config=da_config(**config or {}), **data
    )
    return trainer, trainer


def run_cell(folder, strategy, name, *, compared, place=None, **cell):
    trainer, reporter = make_trainer(folder / (place or name), strategy, **cell)
    base_weights = [p for n, p in trainer.model.named_parameters() if "lora_" not in n]
    loaded_in_parts = all(hasattr(p, "ds_id") and not p.numel() for p in base_weights)
    watch = train(trainer)
    written = load_file(folder / (place or name) / "lora_da" / "adapter_model.safetensors")
    found = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "loaded_in_parts": loaded_in_parts,
        "in_parts": watch.in_parts,
        "report": (reporter.report if hasattr(reporter, "report") else reporter.lora_da_report).to_dict(),
        "left_behind": watch.left_behind,
        "start": largest_difference(watch.start, written),
        "weights": largest_difference(watch.weights, written),
        "masters": largest_difference(watch.masters, written),
        "trained": sorted(watch.weights),
        "batch_size": trainer.state.train_batch_size,
        "initializations": sum("lora_da_step_size" in entry for entry in trainer.state.log_history),
    }
    del trainer, reporter
    gc.collect()
    if compared:
        settings = {key: value for key, value in cell.items() if key not in ("config", "lora", "base", "dtype")}
        args = training_args(folder / f"{name}_loaded", strategy, dtype=cell.get("dtype", "fp32"), **settings)
        model = make_base(cell.get("dtype", "fp32"))
        model = PeftModel.from_pretrained(model, folder / name / "lora_da", is_trainable=True)
        control = train(Trainer(model=model, args=args, train_dataset=samples(), data_collator=collate))
        found["grads"] = [largest_difference(a, b) for a, b in zip(watch.grads, control.grads, strict=True)]
    write(folder, name, found)


def resume(folder, strategy):
    """Stop after a step, go on from the checkpoint, and note whether the adapter is the checkpoint's."""
    manifest = folder / "resume" / "lora_da" / "lora_da_manifest.json"
    saving = {"save_strategy": "steps", "save_steps": 1}
    watch = train(make_trainer(folder / "resume", strategy, max_steps=1, **saving)[0])
    written = manifest.stat().st_mtime_ns
    second, _ = make_trainer(folder / "resume", strategy, max_steps=2, **saving)
    again = train(second, resume_from_checkpoint=str(folder / "resume" / "checkpoint-1"))
    found = {
        "steps": second.state.global_step,
        "start": largest_difference(again.start, watch.weights),
        "layers_recalled": len(second.lora_da_report.layers),
        "untouched": manifest.stat().st_mtime_ns == written,
    }
    write(folder, "resume", found)


def fail(folder, strategy):
    """Have the loss be NaN on one process, in the pass."""
    trainer, _ = make_trainer(folder / "fail", strategy)
    original = trainer.compute_loss

    def loss(*args, **kwargs):
        return original(*args, **kwargs) * (float("nan") if PROCESS == 1 and torch.is_grad_enabled() else 1)

    trainer.compute_loss = loss
    trainer.train()
    write(folder, "trained", True)


def main():
    strategy, *only, folder = sys.argv[1:]
    folder = Path(folder)
    torch.set_num_threads(1)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # the arguments ask for a GPU's
    PartialState(cpu=True)
    if strategy.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if only == ["fail"]:
        fail(folder, strategy)
    if PartialState().is_main_process:
        make_base().save_pretrained(folder / "base")
        make_tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "wide_base")
    PartialState().wait_for_everyone()
    table = {name: (cell, True) for name, cell in cells(strategy).items()}
    table |= {name: (cell, False) for name, cell in others(strategy).items()}
    table = {"head": table.pop("head"), **table}  # before DeepSpeed builds all models in parts, from other draws
    for name, (cell, compared) in table.items():
        if not only or name in only:
            run_cell(folder, strategy, name, compared=compared, **cell)
    if not only or "resume" in only:
        resume(folder, strategy)
    write(folder, "done", True)


if __name__ == "__main__":
    main()
