"""What tests of training, storage and several processes share: arguments, comparisons, and statistics by autograd."""

import dataclasses
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TrainingArguments

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.artifacts.schema import MANIFEST_FILE, parse_manifest
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import file_entry, load_init

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


BASE_NAME = "org/base"


def make_init(folder, **config):
    """Write an initialisation of four small layers, with its statistics, for a base called org/base."""
    from conftest import make_lora_model, make_tiny_llama

    initialize_lora_da(
        make_lora_model(model=make_tiny_llama(name_or_path=BASE_NAME), target_modules=["q_proj", "v_proj"]),
        make_learnable_samples(24),
        config=make_config(**{"save_statistics": True, "step_size": 0.1, **config}),
        data_collator=collate,
        output_dir=folder,
        progress=False,
    )
    return folder


def forge_manifest(folder, **changes):
    """Write the manifest as this library would, with the sizes and hashes of the files as they are now."""
    manifest = parse_manifest((folder / MANIFEST_FILE).read_bytes(), source="here")
    files = {name: file_entry(folder / name) for name in manifest.files}
    forged = dataclasses.replace(manifest, **{"files": files, **changes})
    (folder / MANIFEST_FILE).write_text(forged.to_json())


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


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


STORED_RANK = 8
STORED_MAX_RANK = 16


def store_init(folder, model, samples=None, **overrides):
    """Compute an initialisation of rank 8 that is stored up to rank 16, with the full statistics."""
    settings = {"max_rank": STORED_MAX_RANK, "save_statistics": True}
    initialize_lora_da(
        model,
        make_learnable_samples(24) if samples is None else samples,
        config=make_config(**{**settings, **overrides}),
        data_collator=collate,
        output_dir=folder,
        progress=False,
    )
    return Path(folder)


def dense_updates(folder, ranks, step, config=None):
    """Compute ``step * D^ Q Q^T`` of each layer from stored statistics, by dense solves in numpy.

    Args:
        folder: A stored initialisation with statistics.
        ranks: By layer.
        step: By layer, or one for all.
        config: Dampings and weights; None: the stored ones.
    """
    stored = load_init(folder)
    config = config or LoRADAConfig.from_dict(stored.manifest.config)
    statistics = load_statistics(stored.folder, stored.manifest)
    population = config.population_size or stored.manifest.data["population_size"]
    updates = {}
    for name, rank in ranks.items():
        moment = statistics[name].input_second_moment.double().numpy()
        diagonal = statistics[name].output_grad_second_moment_diag.double().numpy()
        inverse = np.linalg.inv(moment + _dense_damping(config.input_damping, moment.diagonal()) * np.eye(len(moment)))
        inverse_output = 1 / (diagonal + _dense_damping(config.output_damping, diagonal))
        displacement = -inverse_output[:, None] * statistics[name].weight_grad.double().numpy() @ inverse
        norm = np.linalg.norm(displacement, 2) if config.normalize_displacement else 1.0
        displacement = displacement / norm
        variance = config.variance_weight * inverse_output.sum() / (population * norm**2)
        _, vectors = np.linalg.eigh(variance * inverse - config.bias_weight * displacement.T @ displacement)
        basis = vectors[:, :rank]
        updates[name] = (step[name] if isinstance(step, dict) else step) * displacement @ basis @ basis.T
    return updates


def _dense_damping(setting, diagonal):
    amount, _, reference = str(setting).partition("*")
    return float(amount) * (getattr(np, reference)(diagonal) if reference else 1.0)


def written_updates(model):
    """Return ``scaling * B @ A`` of each layer of the active adapter, with PEFT's scaling, in float64."""
    updates = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            adapter = layer.active_adapters[0]
            factor_A, factor_B = (f[adapter].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
            updates[name.removeprefix("base_model.model.")] = layer.scaling[adapter] * factor_B @ factor_A
    return updates


def assert_updates_equal(found, expected, tolerance=1e-6):
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], torch.from_numpy(expected[name])) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.2e}"
