"""`lora-da init` and `lora-da plan`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from lora_da_hf.cli.flags import add, add_dataclasses, add_model, check_new, read
from lora_da_hf.cli.output import Output
from lora_da_hf.errors import ConfigError
from lora_da_hf.training.arguments import LoraArguments, LoRADAArguments, ModelArguments, TextArguments, loader_of


def init_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da init`."""
    add_model(parser)
    about = "a csv, json, jsonl, parquet or txt file, or a data set: a name on the Hub or a folder"
    parser.add_argument("data", metavar="DATA", help=about)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the initialisation")
    add(parser, "overwrite", "replace an initialisation that is there")
    add(parser, "dataset_config_name", "configuration of a data set on the Hub", metavar="NAME")
    add(parser, "split", "split of a data set on the Hub, such as train[:5000] (default: train)", metavar="SPLIT")
    add_dataclasses(parser, LoraArguments, TextArguments, ModelArguments, LoRADAArguments)


def run_init(arguments: argparse.Namespace, output: Output) -> None:
    """Compute an initialisation from data and store it in a folder."""
    text, settings = read(TextArguments, arguments), read(LoRADAArguments, arguments).to_config()
    check_new(arguments.output, overwrite=arguments.overwrite)
    lora = read(LoraArguments, arguments).to_peft()

    from accelerate import PartialState
    from transformers import set_seed

    from lora_da_hf.pipeline import initialize_lora_da
    from lora_da_hf.pipeline.job import DEFAULT_SEED
    from lora_da_hf.training.text import choose_block_size, load_model, tokenize, used_columns, with_adapter

    output.message(f"Reading {arguments.data}")
    rows = _load_rows(arguments)
    output.message(f"Training on {' and '.join(used_columns('training', rows, text))}")
    output.message(f"Loading {arguments.model}")
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


def _load_rows(arguments: argparse.Namespace) -> Any:
    from lora_da_hf.training.text import load_data_set, load_file

    data = Path(arguments.data)
    if not data.is_file() and (data.is_dir() or loader_of(arguments.data) is None):
        split = arguments.split or "train"
        return load_data_set(arguments.data, arguments.dataset_config_name, split=split)
    for flag in ("split", "dataset_config_name"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag} is for a data set on the Hub, and {data} is a file. Leave it out.")
    return load_file(arguments.data)


def plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da plan`."""
    add_model(parser)
    add(parser, "world_size", "processes that share the work", type=int, default=1)
    add_dataclasses(parser, LoraArguments, ModelArguments, LoRADAArguments)


def run_plan(arguments: argparse.Namespace, output: Output) -> None:
    """Tell the passes and the memory that an initialisation takes, from the model's config."""
    settings = read(LoRADAArguments, arguments).to_config()
    lora, loading = read(LoraArguments, arguments).to_peft(), read(ModelArguments, arguments)
    from lora_da_hf.adapters.targets import find_targets
    from lora_da_hf.cli.planning import empty_model, plan_of
    from lora_da_hf.pipeline.plan import gibibytes

    model = empty_model(arguments.model, loading, lora)
    scan = find_targets(model, has_values=False)
    plan = plan_of(model, scan.targets, settings, num_processes=arguments.world_size)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    values = {
        "layers": len(scan.targets),
        "kept": len(scan.kept),
        "processes": plan.num_processes,
        "passes": len(plan.windows),
        "sample_passes": plan.sample_passes,
        "weight_bytes": weights,
        "peak_bytes": plan.peak_bytes,
    }
    text = f"{plan.describe()}; besides, {gibibytes(weights)} of weights, and the activations of a pass"
    if scan.kept:
        number = len(scan.targets) + len(scan.kept)
        reasons = Counter(scan.kept.values()).items()
        why = "; ".join(f"{reason} ({count} layer{'s' * (count > 1)})" for reason, count in reasons)
        text += f"\n{len(scan.kept)} of {number} layers keep PEFT's own initialisation: {why}"
    output.result(values, bare=str(plan.peak_bytes), text=text)
