"""`lora-da init` and `lora-da plan`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from lora_da_hf.cli.verbs import MODEL, Output, argument, flag, flags_of, read, verb
from lora_da_hf.training.arguments import LoraArguments, LoRADAArguments, ModelArguments, TextArguments, loader_of

_DATA = "csv, json, jsonl, parquet or txt files, or data sets: names on the Hub or folders"
_FLAGS = (
    flag("dataset_config_name", "configuration of a data set on the Hub", metavar="NAME"),
    flag("split", "split of the data, such as train[:5000]", metavar="SPLIT", default="train"),
    flags_of(LoraArguments, TextArguments, ModelArguments, LoRADAArguments),
)


@verb(
    "MODEL train.jsonl my-init --prompt_column question --completion_column answer --lora_rank 16",
    MODEL,
    argument("data", "DATA", _DATA, nargs="+"),
    argument("output", "OUTPUT", "folder for the initialisation; one that is there is replaced", type=Path),
    *_FLAGS,
)
def init(arguments: argparse.Namespace, output: Output) -> None:
    """Compute an initialisation from data and store it in a folder."""
    text, settings = read(TextArguments, arguments), read(LoRADAArguments, arguments).to_config()
    lora = read(LoraArguments, arguments).to_peft()

    from accelerate import PartialState
    from transformers import set_seed

    from lora_da_hf.artifacts.folders import check_replaceable
    from lora_da_hf.pipeline import initialize_lora_da
    from lora_da_hf.pipeline.job import DEFAULT_SEED
    from lora_da_hf.training.arguments import with_adapter
    from lora_da_hf.training.text import choose_block_size, load_model, tokenize

    check_replaceable(arguments.output)
    rows = _rows(arguments, text, output)
    output.message(f"Loading {_and_where(arguments.model)}")
    model, tokenizer = load_model(arguments.model, read(ModelArguments, arguments))
    samples = tokenize("training", rows, tokenizer, choose_block_size(text.block_size, model, tokenizer), text)
    set_seed(DEFAULT_SEED)
    report = initialize_lora_da(
        with_adapter(model, lora).to(PartialState().device),
        samples,
        config=settings,
        output_dir=arguments.output,
        progress=output.shows_progress,
    )
    if PartialState().is_main_process:
        folder = str(arguments.output)
        output.result({"folder": folder, **report.to_dict()}, bare=folder, text=f"{report}\n\nWritten to {folder}")


def _and_where(name: str) -> str:
    """Say where a name will be looked up, before a client tries for long to reach the Hub."""
    is_local = Path(name).exists() or loader_of(name)
    return name if is_local else f"{name} from the Hub, since there is no such file or folder"


def _rows(arguments: argparse.Namespace, text: TextArguments, output: Output) -> Any:
    from lora_da_hf.training.text import load_data_set, load_file, mixed, used_columns

    def load(source: str) -> Any:
        if not Path(source).is_file() and (Path(source).is_dir() or loader_of(source) is None):
            return load_data_set(source, arguments.dataset_config_name, split=arguments.split)
        return load_file(source, split=arguments.split)

    output.message(f"Reading {', '.join(map(_and_where, arguments.data))}")
    rows = mixed(arguments.data, [load(source) for source in arguments.data], text, text.data_weights)
    output.message(f"Training on {' and '.join(used_columns('training', rows, text))}")
    return rows


@verb(
    "meta-llama/Llama-3.1-8B train.jsonl --lora_rank 16 --world_size 4 --da_memory_budget 20GiB",
    MODEL,
    argument("data", "DATA", f"{_DATA}; none: all samples have the block size", nargs="*"),
    flag("world_size", "processes that share the work", type=int, default=1),
    *_FLAGS,
)
def plan(arguments: argparse.Namespace, output: Output) -> None:
    """Tell the passes, samples, tokens and memory that an initialisation takes, from the model's config."""
    settings, samples = read(LoRADAArguments, arguments).to_config(), read(TextArguments, arguments)
    lora, loading = read(LoraArguments, arguments).to_peft(), read(ModelArguments, arguments)
    from lora_da_hf.cli.planning import plan_of
    from lora_da_hf.pipeline.plan import gibibytes

    rows = _rows(arguments, samples, output) if arguments.data else None
    count = arguments.world_size
    made, scan, numbers = plan_of(arguments.model, rows, samples, loading, lora, settings, num_processes=count)
    values = {
        "layers": len(scan.targets),
        "kept": len(scan.kept),
        "processes": made.num_processes,
        "passes": len(made.windows),
        "sample_passes": made.sample_passes,
        "peak_bytes": made.peak_bytes,
        "host_bytes": made.host_bytes,
        **numbers,
    }
    memory = settings.memory_budget or "two thirds of the memory that is free now"
    text = (
        f"{made.describe()}; besides, {gibibytes(numbers['weight_bytes'])} of weights, and the activations of a pass\n"
        f"about {numbers['samples_forward']} samples more run forward alone (probe, line search of 8 steps, final "
        f"check); about {numbers['tokens']:,} tokens in all\n"
        f"about {gibibytes(numbers['statistics_bytes'])} of files if statistics are stored (--da_save_statistics)\n"
        f"assumed: samples of {'up to ' * (rows is not None)}{numbers['longest_sample']} tokens, and {memory} for sums "
        "and solve; times are not estimated"
    )
    if scan.kept:
        number = len(scan.targets) + len(scan.kept)
        reasons = Counter(scan.kept.values()).items()
        why = "; ".join(f"{reason} ({count} layer{'s' * (count > 1)})" for reason, count in reasons)
        text += f"\n{len(scan.kept)} of {number} layers keep PEFT's own initialisation: {why}"
    output.result(values, bare=str(made.peak_bytes), text=text)
