"""What tests of training, storage and several processes share: arguments, comparisons, and statistics by autograd."""

import contextlib
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast, TrainingArguments

from lora_da_hf import LoRADAConfig

LINEAR_LAYERS = 14


def make_learnable_samples(count, seed=0):
    """Make samples of different lengths that count in steps of 7 modulo 20, with a prompt without labels in each."""
    generator = random.Random(seed)
    samples = []
    for _ in range(count):
        length = generator.randint(6, 13)
        start = generator.randrange(20)
        ids = [3 + (start + 7 * k) % 20 for k in range(length)]
        prompt = generator.randint(0, 4)
        samples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * prompt + ids[prompt:]})
    return samples


def make_tokenizer():
    """Make a tokenizer of the words w3 to w95."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 96)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )


def collate(samples):
    """Pad on the right."""
    width = max(len(sample["input_ids"]) for sample in samples)
    padding = [width - len(sample["input_ids"]) for sample in samples]
    return {
        "input_ids": torch.tensor([[*s["input_ids"], *[0] * p] for s, p in zip(samples, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(s["input_ids"]) + [0] * p for s, p in zip(samples, padding, strict=True)]
        ),
        "labels": torch.tensor([[*s["labels"], *[-100] * p] for s, p in zip(samples, padding, strict=True)]),
    }


def turn_checkpointing_on(model, *, reentrant):
    """Turn gradient checkpointing on, by the name that this version of transformers has for it."""
    kwargs = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def make_lora_config(**overrides):
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **overrides})


def make_config(**overrides):
    return LoRADAConfig(**{"num_samples": 12, "search_samples": 4, **overrides})


def make_args(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **overrides})


def adapter_weights(model):
    """Copy the adapter's weights, with the names of PEFT's files."""
    return {
        name.replace(".default.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def written_adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} tensors differ: {different[:3]}"


def factors(state, which):
    return {name: tensor for name, tensor in state.items() if f"lora_{which}" in name}


def base_linear_layers(model):
    """Return the linear layers of the base model that carry adapters, by the base model's names."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name: module.base_layer if hasattr(module, "base_layer") else module
        for name, module in base.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


@dataclass
class Reference:
    """Statistics of a layer computed one sample at a time by plain autograd."""

    input_second_moment: torch.Tensor
    output_grad_second_moment_diag: torch.Tensor
    weight_grad: torch.Tensor


def autograd_statistics(model, samples, loss_of):
    """Compute the statistics of every layer from autograd's own gradients.

    Args:
        model: A PEFT model whose adapter is a no-op.
        samples: Samples.
        loss_of: Maps the model and the batch of one sample to that sample's mean loss.
    """
    layers = base_linear_layers(model)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mode = model.training
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = {name: layer.weight.requires_grad_(True) for name, layer in layers.items()}
    inputs, outputs = {}, {}

    def keep(name):
        def hook(_, args, output):
            inputs[name] = args[0].detach()
            outputs[name] = output
            output.retain_grad()

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    sums = {name: [0.0, 0.0, 0.0] for name in layers}
    tokens = 0
    try:
        for sample in samples:
            loss_of(model, collate([sample])).backward()
            tokens += len(sample["input_ids"])
            for name, (moment, squares, grad) in sums.items():
                x = inputs[name][0].double()
                g = outputs[name].grad[0].double()
                sums[name] = [moment + x.T @ x, squares + g.square().sum(0), grad + weights[name].grad.double()]
                weights[name].grad = None
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
        model.train(mode)
    return {
        name: Reference(
            input_second_moment=moment / tokens,
            output_grad_second_moment_diag=squares / tokens,
            weight_grad=grad / len(samples),
        )
        for name, (moment, squares, grad) in sums.items()
    }


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_statistics_equal(found, expected, tolerance):
    """Compare statistics by layer: relative, in the Frobenius norm."""
    assert set(found) == set(expected)
    fields = ("input_second_moment", "output_grad_second_moment_diag", "weight_grad")
    errors = {
        (name, field): relative_error(getattr(found[name], field), getattr(expected[name], field))
        for name, field in itertools.product(expected, fields)
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"


@contextlib.contextmanager
def measured_tensors():
    """Count the memory of the tensors that are made inside, by what torch's allocator reports.

    Yields:
        A list, which gets the peak in bytes at the end of the block.
    """
    peak = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    peak.append(max(itertools.accumulate((event.nbytes() for event in changes), initial=0)))
