"""Builders, oracles and assertions that tests share."""

import contextlib
import dataclasses
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from oracles import autograd_statistics as autograd_statistics
from oracles import base_linear_layers as base_linear_layers
from oracles import collate, expert_weights, lora_layers, relative_error
from oracles import dense_updates as dense_updates
from oracles import items_of as items_of
from oracles import model_loss as model_loss
from oracles import stored_statistics as stored_statistics
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from lora_da_hf import LoRADAConfig, LoRADATrainer, initialize_lora_da
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, Manifest, parse_manifest
from lora_da_hf.artifacts.store import file_entry

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


def once_each(count):
    """Make such samples of which no two have the same tokens, 160 at most."""
    return list({tuple(sample["input_ids"]): sample for sample in make_learnable_samples(20 * count)}.values())[:count]


def make_tokenizer():
    """Make a tokenizer of the words w3 to w95."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 96)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )


def pad_left(samples):
    return collate(samples, left=True)


def collate_classes(samples):
    """Pad samples that have one class each."""
    batch = collate([{**sample, "labels": sample["input_ids"]} for sample in samples])
    return {**batch, "labels": torch.tensor([sample["labels"] for sample in samples])}


def turn_checkpointing_on(model, *, reentrant):
    """Turn gradient checkpointing on, by the name that this version of transformers has for it."""
    kwargs = {"use_reentrant": reentrant}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(model, f"{n}_enable"))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": kwargs})


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


def make_trainer(folder, model, samples=None, kind=LoRADATrainer, arguments=None, **settings):
    """Make a trainer, with small settings of its own if it is ours and starts from no stored initialisation."""
    if issubclass(kind, LoRADATrainer) and "init_from" not in settings:
        settings = {"da_config": make_config(), **settings}
    args, samples = make_args(folder, **(arguments or {})), samples or make_learnable_samples(24)
    return kind(model=model, args=args, train_dataset=samples, **{"data_collator": collate, **settings})


BASE_NAME = "org/base"


def initialize(model, samples, folder=None, *, config=None, loss=None, collator=collate, **settings):
    """Initialise a model without progress bars; settings are the function's own or the config's. Returns the report."""
    own = ("batch_size", "seed", "population_size")
    arguments = {name: settings.pop(name) for name in own if name in settings}
    return initialize_lora_da(
        model,
        samples,
        config=config or make_config(**settings),
        compute_loss=loss,
        data_collator=collator,
        output_dir=folder,
        progress=False,
        **arguments,
    )


def make_init(folder, **config):
    """Write an initialisation of four small layers, with its statistics, for a base called org/base."""
    from conftest import make_lora_model, make_tiny_llama

    model = make_lora_model(model=make_tiny_llama(name_or_path=BASE_NAME), target_modules=["q_proj", "v_proj"])
    initialize(model, make_learnable_samples(24), folder, **{"save_statistics": True, "step_size": 0.1, **config})
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


def written_adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} tensors differ: {different[:3]}"


def factors(state, which):
    return {name: tensor for name, tensor in state.items() if f"lora_{which}" in name}


def assert_statistics_equal(found, expected, tolerance):
    """Compare statistics by layer: relative, in the Frobenius norm."""
    assert set(found) == set(expected)
    fields = ("input_second_moment", "output_grad_second_moment_diag", "weight_grad", "input_mean")
    errors = {
        (name, field): relative_error(getattr(found[name], field), getattr(expected[name], field))
        for name, field in itertools.product(expected, fields)
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"
    for name, layer in expected.items():
        assert found[name].num_input_tokens == layer.num_input_tokens, name
        assert found[name].num_output_tokens == layer.num_output_tokens, name


STORED_RANK = 8
STORED_MAX_RANK = 16


def store_init(folder, model, samples=None, collate=collate, **overrides):
    """Compute an initialisation of rank 8 that is stored up to rank 16, with the full statistics."""
    samples = make_learnable_samples(24) if samples is None else samples
    settings = {"max_rank": STORED_MAX_RANK, "save_statistics": True, **overrides}
    initialize(model, samples, folder, collator=collate, **settings)
    return Path(folder)


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
    errors = {name: relative_error(found[name], torch.as_tensor(expected[name])) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"


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
        experts = expert_weights(model)
        layers = {name for name in lora_layers(model) if name not in experts}
        layers |= {f"{name}[{index}]" for name, weight in experts.items() for index in range(len(weight))}
        return cls(layers=layers, weights=weights)


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
