"""`lora-da init` and `lora-da plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_da_hf.cli.flags import Flags, dataclass_flags, joined, new_folder, positive, read
from lora_da_hf.cli.output import Output, hide_progress_bars
from lora_da_hf.errors import ConfigError, DataError
from lora_da_hf.training.arguments import (
    LoraArguments,
    LoRADAArguments,
    ModelArguments,
    TextArguments,
    check_data_file,
    loader_of,
)


def init_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da init`."""
    own = Flags()
    own.add_argument("model", metavar="MODEL", help="causal language model: a name on the Hub or a local folder")
    own.add_argument(
        "data",
        metavar="DATA",
        help="a csv, json, jsonl, parquet or txt file, or a data set: a name on the Hub or a folder",
    )
    own.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the initialisation")
    own.flag("overwrite", action="store_true", help="replace an initialisation that is there")
    own.flag("dataset_config_name", help="configuration of a data set on the Hub")
    own.flag("split", help="split of a data set on the Hub, such as train[:5000] (default: train)")
    return joined(own, dataclass_flags(LoraArguments, TextArguments, ModelArguments, LoRADAArguments))


def run_init(arguments: argparse.Namespace, output: Output) -> None:
    """Compute an initialisation without a trainer."""
    text, settings = read(TextArguments, arguments), read(LoRADAArguments, arguments).to_config()
    text.check(_refuse)
    folder = new_folder(arguments.output, overwrite=arguments.overwrite)
    lora = read(LoraArguments, arguments).to_peft()
    rows = _load_rows(arguments, output)

    from accelerate import PartialState
    from transformers import set_seed

    from lora_da_hf.pipeline import initialize_lora_da
    from lora_da_hf.pipeline.run import DEFAULT_SEED
    from lora_da_hf.training.text_data import column_names, tokenize, used_columns
    from lora_da_hf.training.text_model import choose_block_size, load_model, with_adapter

    output.message(used_columns("training", column_names("training", rows), text))
    output.message(f"Loading {arguments.model}")
    model, tokenizer = load_model(arguments.model, read(ModelArguments, arguments))
    samples = tokenize("training", rows, tokenizer, choose_block_size(text.block_size, model, tokenizer), text)
    set_seed(DEFAULT_SEED if settings.seed is None else settings.seed)
    peft_model: Any = with_adapter(model, lora)
    report = initialize_lora_da(
        peft_model.to(PartialState().device),
        samples,
        config=settings,
        output_dir=folder,
        progress=output.shows_progress,
    )
    if not PartialState().is_main_process:
        return
    values = {
        "folder": str(folder),
        "num_samples": report.num_samples,
        "step_size": report.step_size,
        "unseen_loss_before": report.unseen_loss_before,
        "unseen_loss_after": report.unseen_loss_after,
        "layers": len(report.layers),
        "kept": len(report.kept),
        "seconds": round(report.total_seconds, 3),
    }
    output.result(values, bare=str(folder), text=f"{report}\n\nWritten to {folder}")


def _refuse(message: str) -> None:
    raise ConfigError(f"{message}.")


def _load_rows(arguments: argparse.Namespace, output: Output) -> Any:
    """Load the data: a file if it is one or is named like one, or else a data set."""
    model, data = Path(arguments.model), Path(arguments.data)
    if model.is_file() and (data.is_dir() or not data.exists()):
        raise ConfigError(
            f"MODEL {model} is a file, no model: MODEL comes before DATA. Give the two the other way round."
        )
    is_file = data.is_file() or (loader_of(arguments.data) is not None and not data.is_dir())
    if is_file:
        check_data_file(arguments.data, _refuse_data)
    for flag in ("split", "dataset_config_name"):
        if is_file and getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag} is for a data set on the Hub, and {data} is a file. Leave it out.")
    from lora_da_hf.training.text_data import load_data_set, load_file

    if not output.shows_progress:
        hide_progress_bars()
    output.message(f"Reading {data}")
    if is_file:
        return load_file(arguments.data, cache_dir=arguments.cache_dir)
    return load_data_set(
        arguments.data, arguments.dataset_config_name, split=arguments.split or "train", cache_dir=arguments.cache_dir
    )


def _refuse_data(message: str) -> None:
    raise DataError(f"{message}.")


def plan_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da plan`."""
    own = Flags()
    own.add_argument("model", metavar="MODEL", help="causal language model: a name on the Hub or a local folder")
    own.flag("tokens", type=positive, default=1024, help="tokens of a sample, at most (default: 1024)")
    own.flag("world_size", type=positive, default=1, help="processes that share the work (default: 1)")
    return joined(own, dataclass_flags(LoraArguments, ModelArguments, LoRADAArguments))


def run_plan(arguments: argparse.Namespace, output: Output) -> None:
    """Print the plan of an initialisation of a model that is not loaded."""
    settings = read(LoRADAArguments, arguments).to_config()
    if not output.shows_progress:
        hide_progress_bars()

    from lora_da_hf.adapters.targets import find_targets
    from lora_da_hf.cli.planning import (
        counted,
        empty_model,
        measure_speed,
        usable_bytes,
        weight_bytes,
        workload,
    )
    from lora_da_hf.pipeline.plan import gibibytes, make_plan

    model = empty_model(arguments.model, arguments)
    scan = find_targets(model, has_values=False)
    plan = make_plan(
        workload(model, scan.targets, settings, tokens=arguments.tokens),
        num_processes=arguments.world_size,
        budget={0: usable_bytes(settings, num_processes=arguments.world_size)},
        schedule=settings.schedule,
        solve_alone=settings.save_statistics,
    )
    speed = measure_speed(model.dtype)
    collect, solve = plan.seconds(speed)
    weights = weight_bytes(model)
    values = {
        "layers": len(scan.targets),
        "kept": len(scan.kept),
        "schedule": plan.schedule,
        "processes": plan.num_processes,
        "passes": len(plan.windows),
        "sample_passes": plan.sample_passes,
        "weight_bytes": weights,
        "peak_bytes": plan.peak_bytes,
        "sent_bytes": plan.sent_bytes,
        "statistics_seconds": round(collect, 1),
        "solve_seconds": round(solve, 1),
    }
    text = (
        f"{plan.describe(speed)} at this machine's speed; besides, {gibibytes(weights)} of weights, "
        "and the activations of a pass"
    )
    if scan.kept:
        number = len(scan.targets) + len(scan.kept)
        text += f"\n{len(scan.kept)} of {number} layers keep PEFT's own initialisation: {counted(scan.kept)}"
    output.result(values, bare=str(plan.peak_bytes), text=text)
