"""What tests of training, storage and several processes share: arguments, comparisons, and statistics by autograd."""

import contextlib
import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, Manifest, parse_manifest
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


def collate_classes(samples):
    """Pad on the right samples that have one class each."""
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {**collate([{**sample, "labels": sample["input_ids"]} for sample in samples]), "labels": labels}


def pad_left(samples):
    """Pad on the left."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([[value] * (longest - len(s[name])) + s[name] for s in samples])
        for name, value in padding.items()
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


def make_args(folder, kind=TrainingArguments, **overrides):
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
    return kind(**{**settings, **overrides})


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
    """Write the manifest as this library would, with the sizes and hashes of the files as they are now.

    Changes are of the manifest's fields, or else of its report's.
    """
    manifest = parse_manifest((folder / MANIFEST_FILE).read_bytes(), source="here")
    own = {name: changes.pop(name) for name in list(changes) if name in Manifest.model_fields}
    files = {name: file_entry(folder / name) for name in manifest.files}
    report = dataclasses.replace(manifest.report, **changes)
    forged = manifest.model_copy(update={"files": files, "report": report, **own})
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


EIGHT = {"num_samples": 8, "search_samples": 2, "save_statistics": True}
"""Settings of an initialisation from eight samples, whose statistics can be looked at."""


def chosen(samples, count=8, drawn=12, seed=42):
    """Return the samples that a run takes its statistics from, in their order: a draw that the seed fixes.

    Args:
        samples: All of them.
        count: How many the statistics are taken from.
        drawn: How many are drawn: those, and twice as many as the line search may have.
        seed: The run's.
    """
    positions = random.Random(seed).sample(range(len(samples)), min(drawn, len(samples)))
    return [samples[position] for position in positions[:count]]


def stored_statistics(folder):
    """Return the statistics of a stored initialisation, by layer."""
    stored = load_init(folder)
    return load_statistics(stored.folder, stored.manifest)


def written_adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} tensors differ: {different[:3]}"


def factors(state, which):
    return {name: tensor for name, tensor in state.items() if f"lora_{which}" in name}


def _lora_layers(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {n: m for n, m in base.named_modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")}


def base_linear_layers(model):
    """Return the layers of the base model that carry adapters, by the base model's names."""
    return {name: module.base_layer for name, module in _lora_layers(model).items()}


@dataclass
class Reference:
    """Statistics of a layer computed one sample at a time by plain autograd."""

    weight_grad: torch.Tensor
    input_second_moment: torch.Tensor
    output_grad_second_moment_diag: torch.Tensor

    @classmethod
    def of(cls, weight_grad, rows):
        """Take the means over rows of inputs and of output gradients, each a list of ``[rows, features]``."""
        x, g = (torch.cat(parts).double() for parts in rows)
        return cls(weight_grad, x.mT @ x / len(x), g.square().mean(0))


def autograd_statistics(model, samples, loss_of, collate=collate):
    """Compute the statistics of every layer from autograd's own gradients.

    Args:
        model: A PEFT model whose adapter is a no-op.
        samples: Samples.
        loss_of: Maps the model and the batch of one sample to that sample's mean loss.
        collate: Makes batches. Of a batch's rows, one for each place of its attention mask, those that are attended to
            count in the second moments.
    """
    layers = {n: m for n, m in base_linear_layers(model).items() if isinstance(m, torch.nn.Linear | Conv1D)}
    weights = {**{name: layer.weight for name, layer in layers.items()}, **_expert_weights(model)}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mode = model.training
    model.eval()
    calls = []

    def keep(name):
        def hook(_, args, output):
            if not output.requires_grad:  # as in a reference model's pass
                return output
            output.retain_grad()
            calls.append((name, args[0].detach(), output))
            return output.clone()  # what comes next may change it in place

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    rows = {name: ([], []) for name in layers}
    try:
        with model.disable_adapter():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for sample in samples:
                batch = collate([sample])
                attended = batch.get("attention_mask", torch.ones(0)).bool().flatten()
                loss_of(model, batch).backward()
                for name, x, y in calls:
                    if y.grad is not None:
                        counts = attended if len(attended) == y[..., 0].numel() else slice(None)
                        rows[name][0].append(x.reshape(-1, x.shape[-1])[counts])
                        rows[name][1].append(y.grad.reshape(-1, y.shape[-1])[counts])
                calls.clear()
            grads = {name: weight.grad.double() / len(samples) for name, weight in weights.items()}
            expert_rows = _rows_of_experts(model, lambda: [loss_of(model, collate([s])).backward() for s in samples])
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        model.train(mode)
    found = {
        name: Reference.of(grads[name].mT if isinstance(layer, Conv1D) else grads[name], rows[name])
        for name, layer in layers.items()
    }
    for name, layer in _expert_layers(model).items():
        by_expert = grads[name].mT if layer.get_base_layer().is_transposed else grads[name]
        for index, grad in enumerate(by_expert):
            found[f"{name}[{index}]"] = Reference.of(grad, expert_rows[name, index])
    return found


def _rows_of_experts(model, run_backward):
    """Return inputs and output gradients of the tokens that each expert gets, by layer and number of the expert.

    Every expert is run on every token, and what the router does not send to it is left out of the result.
    """
    names = {}
    for name, layer in _expert_layers(model).items():
        names.setdefault(layer.get_base_layer(), {})[layer.parameter_name] = name
    rows = {
        (name, index): ([], [])
        for experts in names
        for name in names[experts].values()
        for index in range(experts.num_experts)
    }

    def apply(experts, parameter, index, x, routed):
        weight, bias = getattr(experts, parameter)[index], getattr(experts, f"{parameter}_bias", None)
        y = x @ (weight if experts.is_transposed else weight.mT)
        y = y if bias is None else y + bias[index]
        if parameter in names[experts]:
            inputs, grads = rows[names[experts][parameter], index]
            inputs.append(x.detach()[routed])
            y.register_hook(lambda grad: grads.append(grad[routed]))
        return y

    def on_all_tokens(experts):
        def forward(hidden, chosen, weights):
            result = torch.zeros_like(hidden)
            for index in range(experts.num_experts):
                routed = (chosen == index).any(-1)
                inner = experts._apply_gate(apply(experts, "gate_up_proj", index, hidden, routed))
                share = weights.masked_fill(chosen != index, 0).sum(-1, keepdim=True)
                result = result + share * apply(experts, "down_proj", index, inner, routed)
            return result

        return forward

    try:
        for experts in names:
            experts.forward = on_all_tokens(experts)
        run_backward()
    finally:
        for experts in names:
            del experts.forward
    return rows


def _expert_layers(model):
    """Return PEFT's layers of the parameters of all experts that carry adapters, by name."""
    wrappers = {name: module for name, module in _lora_layers(model).items() if isinstance(module, ParamWrapper)}
    return {name: module for name, module in wrappers.items() if module.get_param().dim() == 3}


def _expert_weights(model):
    return {name: layer.get_param() for name, layer in _expert_layers(model).items()}


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


def store_init(folder, model, samples=None, collate=collate, **overrides):
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
    config = config or stored.manifest.config
    statistics = load_statistics(stored.folder, stored.manifest)
    population = config.population_size or stored.manifest.report.population_size
    tokens = {name: statistics[name].num_output_tokens for name in stored.manifest.layers}
    displacements = {name: _dense_displacement(statistics[name], config)[0] for name in tokens}
    unit = max(np.linalg.norm(displacements[name], 2) / tokens[name] for name in tokens)
    return {
        name: (step[name] if isinstance(step, dict) else step)
        / (1.0 if config.layer_steps == "equal" else unit * tokens[name])
        * _dense_update(statistics[name], config, population, rank)
        for name, rank in ranks.items()
    }


def _dense_displacement(statistics, config):
    """Compute D, and the inverses of the damped factors that are in it."""
    moment = statistics.input_second_moment.double().numpy()
    diagonal = statistics.output_grad_second_moment_diag.double().numpy()
    inverse = np.linalg.inv(moment + _dense_damping(config.input_damping, moment.diagonal()) * np.eye(len(moment)))
    inverse_output = 1 / (diagonal + _dense_damping(config.output_damping, diagonal))
    return -inverse_output[:, None] * statistics.weight_grad.double().numpy() @ inverse, inverse, inverse_output


def _dense_update(statistics, config, population, rank):
    """Compute ``D Q Q^T`` of a layer, with D divided by its norm if all layers go equally far."""
    displacement, inverse, inverse_output = _dense_displacement(statistics, config)
    norm = np.linalg.norm(displacement, 2) if config.layer_steps == "equal" else 1.0
    displacement = displacement / norm
    if config.metric == "fisher":
        root, output_root = np.linalg.cholesky(np.linalg.inv(inverse)), inverse_output[:, None] ** 0.5
        left, singular, right = np.linalg.svd(displacement / output_root @ root, full_matrices=False)
        return output_root * (left[:, :rank] * singular[:rank] @ right[:rank]) @ np.linalg.inv(root)
    variance = config.variance_weight * inverse_output.sum() / (population * norm**2)
    _, vectors = np.linalg.eigh(variance * inverse - config.bias_weight * displacement.T @ displacement)
    basis = vectors[:, :rank]
    return displacement @ basis @ basis.T


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


def lora_layer_names(model):
    """Return the name of every LoRA layer, an expert being one."""
    experts = _expert_weights(model)
    single = [name for name in _lora_layers(model) if name not in experts]
    return {*single, *(f"{name}[{index}]" for name, weight in experts.items() for index in range(len(weight)))}


@dataclass(frozen=True)
class Adapter:
    """The active adapter of a model at one moment.

    Attributes:
        layers: The name of every LoRA layer, an expert being one.
        weights: Copies of its weights, with the names of PEFT's files.
    """

    layers: set[str]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model):
        state = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        weights = {name: tensor.detach().clone() for name, tensor in state.items() if "lora_" in name}
        return cls(layers=lora_layer_names(model), weights=weights)


class Starts(TrainerCallback):
    """Keeps the adapter as the first step of each training finds it."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.found.append(Adapter.of(model))


def train_from(trainer):
    """Train, and return the adapter as the first step found it."""
    starts = Starts()
    trainer.add_callback(starts)
    trainer.train()
    return starts.found[-1]


def assert_initialized(folder, start, report, kept=()):
    """Check that training started from the initialisation, and that no layer was left at PEFT's default in silence.

    Args:
        folder: Where the initialisation was written.
        start: The `Adapter` that the first step found, or, without a trainer, that of the model afterwards.
        report: Its report.
        kept: Endings of the names of layers that are expected to keep PEFT's own initialisation.
    """
    done = {layer.name for layer in report.layers}
    assert done | set(report.kept) == start.layers
    assert not done & set(report.kept)
    assert all(name.endswith(tuple(kept)) for name in report.kept), report.kept
    assert report.step_size > 0
    written = written_adapter(folder)
    assert_made_from_data(written, {layer.name: layer.rank for layer in report.layers})
    assert_same_tensors(start.weights, {name: tensor for name, tensor in written.items() if "lora_" in name})


def assert_made_from_data(state, ranks):
    """Check that rows of A are orthogonal and of one norm, which PEFT's random ones are not, and that B is not zero.

    Args:
        state: A stored adapter.
        ranks: The rank of each layer that is to be such.
    """
    for name, rank in ranks.items():
        lora_A, lora_B = written_factors(state, name, rank)
        torch.testing.assert_close(3 * lora_A @ lora_A.mT, torch.eye(rank), atol=1e-4, rtol=0)
        assert lora_B.any(), name


def written_factors(state, name, rank):
    """Return A and B of one layer of a stored adapter."""
    stored_in, bracket, index = name.rstrip("]").partition("[")
    lora_A, lora_B = (state[f"base_model.model.{stored_in}.lora_{which}.weight"] for which in "AB")
    if bracket:
        first, count = int(index) * rank, lora_A.shape[0] // rank
        return lora_A[first : first + rank], lora_B[:, int(index) :: count]
    return lora_A, lora_B


def send_nothing_to_the_last_expert(_, args, output):
    """Change what a router of Mixtral chose, as a forward hook."""
    logits, weights, chosen = output
    return logits, weights, torch.where(chosen == 3, (chosen.sum(-1, keepdim=True) - 3 + 1) % 3, chosen)


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


class CountedOperations(TorchDispatchMode):
    """Count the arithmetic operations of the products and factorizations inside: work that no busy machine changes.

    Attributes:
        total: So far; a multiplication and its addition are two, factorizations count by their leading term.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in FACTORIZATIONS:
            self.total += FACTORIZATIONS[packet](*(argument.shape for argument in args if isinstance(argument, Tensor)))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten.addmm_:
            self.total += flop_registry[torch.ops.aten.addmm](*args, out_val=out)
        return out


FACTORIZATIONS = {
    torch.ops.aten._linalg_eigh: lambda matrix: 9 * math.prod(matrix) * matrix[-1],
    torch.ops.aten._linalg_svd: lambda matrix: 6 * math.prod(matrix) * min(matrix[-2:]),
    torch.ops.aten.linalg_qr: lambda matrix: 4 * math.prod(matrix) * min(matrix[-2:]),
    torch.ops.aten.linalg_cholesky_ex: lambda matrix: math.prod(matrix) * matrix[-1] // 3,
    torch.ops.aten.linalg_solve_triangular: lambda triangle, right: math.prod(right) * triangle[-1],
}
