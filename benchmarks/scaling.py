"""What one and two processes take, with windows and without: seconds and memory, beside what was planned.

Each measurement starts processes of its own, with one thread each, on a random Llama with gradient checkpointing. Run
it on a machine that does nothing else and has a core for each process:

    python benchmarks/scaling.py

Runs and tables go to `outputs`, or where `--output` says.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import machine, peak_mib, reset_peak, write_runs
from peft import LoraConfig, get_peft_model
from report import markdown
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import lora_da_hf.pipeline.run as run_module
from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.pipeline.plan import Plan

SETTINGS = ("num_samples", "blocks", "length", "batch_size")
MIB = 2**20
WINDOW_MIB = 128
MODEL_SEED, DATA_SEED = 0, 1
MODEL = {
    "vocab_size": 512,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
}

CASES = {
    "one": ("one process, one pass", 1, None),
    "one_windows": ("one process, windows", 1, WINDOW_MIB * MIB),
    "samples": ("two share the samples", 2, None),
    "samples_windows": ("two share the samples, windows", 2, WINDOW_MIB * MIB),
}
"""Of each row: its title, how many processes, and their memory budget."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="besides one, which all need")
    parser.add_argument("--output", type=Path, default=Path("outputs/scaling.json"))
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cases = [name for name in CASES if name == "one" or name in options.cases]
    return options


# ---- one process of a measurement


def make_model(blocks: int) -> Any:
    torch.manual_seed(MODEL_SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, num_hidden_layers=blocks))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


def make_samples(count: int, length: int) -> list[dict[str, list[int]]]:
    torch.manual_seed(DATA_SEED)
    rows = torch.randint(3, MODEL["vocab_size"], (count, length)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Make one measurement: seconds, or under the profiler the peak of the tensors."""
    _, processes, budget = CASES[options.worker]
    if processes > 1:
        dist.init_process_group("gloo")
    plans: list[Plan] = []
    original = run_module.plan_windows
    run_module.plan_windows = lambda job, found: plans.append(original(job, found)) or plans[0]
    config = LoRADAConfig(
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        step_size=0.05,
        search_samples=0,
        memory_budget=budget,
    )
    samples = make_samples(options.num_samples, options.length)
    model = make_model(options.blocks)
    initialize_lora_da(make_model(options.blocks), samples[:4], config=config, progress=False)  # warm up
    plans.clear()
    if processes > 1:
        dist.barrier()  # all begin at once
    reset_peak()
    before = peak_mib()
    begin = time.perf_counter()
    kinds = [ProfilerActivity.CPU]
    with profile(activities=kinds, profile_memory=True) if options.memory else contextlib.nullcontext() as profiler:
        report = initialize_lora_da(model, samples, config=config, progress=False)
    return {
        "seconds": time.perf_counter() - begin,
        "stages": report.seconds,
        "rss_mib": peak_mib() - before,
        "tensor_bytes": tensor_peak(profiler) if options.memory else None,
        "plan": {"sample_passes": plans[0].sample_passes, "peak_bytes": plans[0].peak_bytes},
        "printed": report.plan,
    }


def tensor_peak(profiler: Any) -> int:
    """Return the most bytes that tensors took at once."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


# ---- all measurements


def launch(name: str, options: argparse.Namespace, *, memory: bool) -> list[dict[str, Any]]:
    """Start the processes of a case, and return what each measured."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, __file__, "--worker", name, *(["--memory"] if memory else [])]
    for setting in SETTINGS:
        command += [f"--{setting}", str(getattr(options, setting))]
    size = CASES[name][1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, **output) for rank in range(size)
    ]
    outputs = [process.communicate() for process in started]
    failed = [errors for found, errors in outputs if not found]
    if failed:
        raise RuntimeError(f"A process of {name} failed: {failed[0]}")
    return [json.loads(found.splitlines()[-1]) for found, _ in outputs]


def measure(options: argparse.Namespace) -> dict[str, list[list[dict[str, Any]]]]:
    """Run every case once, then all of them again; and once more each for the memory of its tensors."""
    settings = {name: getattr(options, name) for name in (*SETTINGS, "repeats")}
    settings |= {"model": MODEL, "window_mib": WINDOW_MIB}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in options.cases}
    for repeat in range(options.repeats + 1):
        for name in options.cases:
            found[name].append(launch(name, options, memory=repeat == options.repeats))
            print(f"run {repeat + 1}: {name} {found[name][-1][0]['seconds']:.1f} s", file=sys.stderr, flush=True)
            write_runs(options.output, settings, found)
    return found


# ---- the tables


def measured_table(found: dict[str, list[list[dict[str, Any]]]], options: argparse.Namespace) -> list[str]:
    """Compare what was measured with the plan: of each case the largest of its processes.

    Of the runs of a case, the last measured the memory of tensors.
    """
    rows: list[tuple[Any, ...]] = []
    one: list[float] = []
    for name, (*timed, memory) in found.items():
        whole = [max(process["seconds"] for process in run) for run in timed]
        one = one or whole
        rows.append(
            (
                CASES[name][0],
                spread(whole),
                f"{statistics.median(whole) / statistics.median(one):.2f}",
                spread([max(p["stages"]["statistics"] + p["stages"]["solve"] for p in run) for run in timed]),
                timed[0][0]["plan"]["sample_passes"],
                f"{max(process['tensor_bytes'] for process in memory) / MIB:.0f}",
                f"{timed[0][0]['plan']['peak_bytes'] / MIB:.0f}",
                f"{max(process['rss_mib'] for run in timed for process in run):.0f}",
            )
        )
    columns = (
        *("", "whole, s, median (range)", "x one", "statistics and solve, s", "passes"),
        *("tensors at their peak, MiB", "planned", "resident, MiB"),
    )
    facts = ", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads")
    return [
        *markdown(columns, rows),
        "",
        f"Llama with {options.blocks} blocks of width {MODEL['hidden_size']} and {MODEL['intermediate_size']}, "
        f"gradient checkpointing, {options.num_samples} samples of {options.length} tokens, batch size "
        f"{options.batch_size}, rank 8, float32, one thread a process, windows of {WINDOW_MIB} MiB, {options.repeats} "
        f"runs, seeds {MODEL_SEED} (model) and {DATA_SEED} (samples). Passes: samples forward and backward in the "
        f"busiest process. Tensors: by torch's allocator in a run of its own, activations included. {facts}.",
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    options = parse_arguments()
    if options.worker:
        torch.set_num_threads(1)
        print(json.dumps(work(options)), flush=True)
        os._exit(0)  # gloo sometimes aborts in its teardown
    found = measure(options)
    text = "\n".join(measured_table(found, options))
    options.output.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
