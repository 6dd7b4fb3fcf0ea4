"""Fine-tune a small language model twice on this machine, from plain LoRA and from LoRA-DA, and compare.

The model is SmolLM2-135M-Instruct, the task is to write the body of a Python function from its signature and
docstring, and the data are the functions of Python's standard library. Both runs are `scripts/run_clm.py` with the
same flags but `--init`, and see the same batches in the same order. The number of steps is chosen so that it takes
about eight minutes on this machine.

    python scripts/demo.py
"""

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from demo_data import MAX_TOKENS, folder_name, write_data
from demo_model import fetch_model

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache"
MARK = ".lora_da_demo"
LABELS = {"lora": "plain LoRA", "lora_da": "LoRA-DA"}


@dataclass(frozen=True)
class Budget:
    """How much the demo computes."""

    steps: int
    eval_samples: int
    da_samples: int
    search_samples: int


FULL = Budget(steps=50, eval_samples=48, da_samples=64, search_samples=8)
SMALL = Budget(steps=50, eval_samples=24, da_samples=32, search_samples=4)
QUICK = Budget(steps=2, eval_samples=8, da_samples=16, search_samples=2)
ENOUGH_STEPS = 20
FEWEST_STEPS = 10
SECONDS = 480
MOST_PRODUCTS, SECONDS_OF_PRODUCTS = 300, 2.0
BATCH_SIZE = 8


@dataclass(frozen=True)
class Run:
    """What one run left behind: losses by step, and the seconds of its initialisation."""

    folder: Path
    train: dict[int, float]
    validation: dict[int, float]
    initialization: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read the losses that the trainer recorded."""
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        losses = [{e["step"]: e[name] for e in history if name in e} for name in ("loss", "eval_loss")]
        return cls(folder, *losses, sum(entry.get("lora_da_seconds", 0.0) for entry in history))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, help=f"training steps of each run (default: what fits, up to {FULL.steps})"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="default: outputs/demo")
    parser.add_argument("--model", help="another causal language model, a folder or a name on the Hub")
    parser.add_argument("--quick", action="store_true", help="two steps on a few functions: only to see it work")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    return arguments


def measure_speed(dtype: str) -> float:
    """Return how many floating-point operations a second this CPU does in a layer of the model.

    A CPU without instructions for bfloat16 may take seconds for a product in it, and does one or two then.
    """
    import torch

    tokens, inputs, outputs = 1024, 576, 1536
    left = torch.randn(tokens, inputs).to(getattr(torch, dtype))
    right = torch.randn(inputs, outputs).to(getattr(torch, dtype))
    seconds: list[float] = []
    while len(seconds) < MOST_PRODUCTS and sum(seconds) < SECONDS_OF_PRODUCTS:
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * tokens * inputs * outputs / statistics.median(seconds)


def fit(speed: float) -> tuple[Budget, float]:
    """Return what fits into the time on this CPU, with fewer samples if it is slow, and about how long it takes.

    The figures were measured with SmolLM2-135M: a step takes over twice as long as its matrix products, a forward pass
    less than half a step, and expanding the model, starting twice and solving the eigenproblems 80 s.
    """
    step = 2.3 * 4 * 135e6 * BATCH_SIZE * 140 / speed
    for budget in (FULL, SMALL):
        passes = 6 * budget.eval_samples + 12 * budget.search_samples
        fixed = 80 + (1.15 * budget.da_samples + 0.43 * passes) / BATCH_SIZE * step
        steps = int((SECONDS - fixed) / (2 * step)) // 2 * 2
        if steps >= ENOUGH_STEPS:
            break
    steps = max(FEWEST_STEPS, min(budget.steps, steps))
    return replace(budget, steps=steps), fixed + 2 * steps * step


def plan(arguments: argparse.Namespace) -> tuple[str, Budget]:
    """Choose the precision that this CPU multiplies faster, and the number of steps unless it was given."""
    speeds = {dtype: measure_speed(dtype) for dtype in ("bfloat16", "float32")}
    dtype = max(speeds, key=speeds.__getitem__)
    budget, seconds = fit(speeds[dtype])
    measured = ", ".join(f"{speed / 1e9:.0f} GFLOP/s in {name}" for name, speed in speeds.items())
    print(f"This CPU does {measured}. The weights are {dtype}.")
    if arguments.quick or arguments.steps:
        budget = replace(QUICK if arguments.quick else budget, steps=arguments.steps or QUICK.steps)
    else:
        print(f"Both runs, plain LoRA first, are to take about {seconds / 60:.0f} minutes if nothing else runs.")
    print(f"Each run has {budget.steps} steps.")
    return dtype, budget


def make_data(model: str) -> tuple[Path, Path]:
    """Write the data, with lengths as this model counts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = CACHE / "demo_data" / f"{folder_name()}-{tokenizer.vocab_size}"
    return write_data(folder, lambda text: len(tokenizer(text)["input_ids"]))


def command(init: str, model: str, data: tuple[Path, Path], output_dir: Path, dtype: str, budget: Budget) -> list[str]:
    """Return the command of one run. Two commands differ in `--init` and `--output_dir` only."""
    flags = {
        "init": init,
        "output_dir": output_dir,
        "model_name_or_path": model,
        "dtype": dtype,
        "train_file": data[0],
        "validation_file": data[1],
        "prompt_column": "prompt",
        "completion_column": "completion",
        "block_size": MAX_TOKENS,
        "max_eval_samples": budget.eval_samples,
        "lora_rank": 8,
        "da_num_samples": budget.da_samples,
        "da_search_samples": budget.search_samples,
        "max_steps": budget.steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.03 * budget.steps),
        "seed": 42,
        "logging_steps": max(1, budget.steps // 20),
        "eval_strategy": "steps",
        "eval_steps": math.ceil(budget.steps / 2),
        "save_strategy": "no",
        "report_to": "none",
    }
    switches = ["--do_train", "--do_eval", "--eval_on_start", "--use_rslora", "--use_cpu"]
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, str(REPOSITORY / "scripts" / "run_clm.py"), *pairs, *switches]


def execute(arguments: list[str], output_dir: Path) -> Run:
    """Run one training from scratch, over what an earlier demo left, and read its losses."""
    shutil.rmtree(output_dir, ignore_errors=True)
    print(f"\n$ {shlex.join(['python', *arguments[1:]])}\n", flush=True)
    if subprocess.run(arguments, check=False).returncode != 0:
        sys.exit("The training above failed, so the demo stops here. The command above repeats it alone.")
    return Run.read(output_dir)


def table(runs: dict[str, Run]) -> str:
    """Write the validation losses as a table."""
    steps = sorted(set.intersection(*(set(run.validation) for run in runs.values())))
    rows = [["validation loss", *(f"step {step}" for step in steps)]]
    rows.append(["base model", f"{runs['lora'].validation[0]:.4f}"])
    rows += [[LABELS[init], *(f"{run.validation[step]:.4f}" for step in steps)] for init, run in runs.items()]
    return "\n".join(f"{row[0]:<16}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)


def verdict(when: str, loss: float, other: float, other_name: str) -> str:
    """Say which loss is lower, and by how much."""
    word = "lower" if loss <= other else "HIGHER"
    size = f"{abs(loss - other):.4f} ({abs(loss - other) / other:.2%})"
    return f"{when}, LoRA-DA's validation loss is {size} {word} than that of {other_name}."


def draw(runs: dict[str, Run], path: Path) -> None:
    """Plot training and validation losses of both runs side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, which in zip(figure.subplots(1, 2), ("train", "validation"), strict=True):
        for init, run in runs.items():
            losses = getattr(run, which)
            axes.plot(list(losses), list(losses.values()), marker="." if which == "train" else "o", label=LABELS[init])
        axes.set(title=which, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    axes.axhline(runs["lora"].validation[0], color="grey", linestyle=":", label="base model")
    axes.legend()
    figure.savefig(path, dpi=150)


def report(runs: dict[str, Run], seconds: dict[str, float], budget: Budget, output_dir: Path) -> None:
    """Print the results, what they do not say, and where the files are; store picture and numbers."""
    lora, lora_da = runs["lora"], runs["lora_da"]
    draw(runs, output_dir / "comparison.png")
    losses = {init: {"train": run.train, "validation": run.validation} for init, run in runs.items()}
    summary = json.dumps({"losses": losses, "seconds": seconds}, indent=2)
    (output_dir / "summary.json").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{table(runs)}\n")
    print(verdict("Before the first step", lora_da.validation[0], lora.validation[0], "the base model"))
    ends = [run.validation[max(run.validation)] for run in (lora_da, lora)]
    print(verdict("After the last step", *ends, LABELS["lora"]))
    print(f"This is one seed on {budget.eval_samples} held-out functions: a small difference may be chance.")
    if budget.steps < FULL.steps:
        print(
            f"{budget.steps} steps are few, and so short a training flatters a start from data: after {FULL.steps}, "
            "most of its lead is gone (README.md)."
        )
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"Seconds: {took}. The initialisation took {lora_da.initialization:.0f} of LoRA-DA's.\n")
    print(f"{output_dir}: comparison.png, summary.json, and in lora and lora_da the adapters with their loss curves.")
    print(f"The initialisation is in {lora_da.folder / 'lora_da'}.")


def main() -> None:
    """Run the demo."""
    arguments = parse_arguments()
    output_dir = arguments.output_dir
    take(output_dir)
    # Threads that wait without spinning cost little on a quiet machine, and save half the time on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def finished(stage: str) -> None:
        seconds[stage] = round(time.monotonic() - started - sum(seconds.values()), 1)

    model = arguments.model or str(fetch_model(CACHE / "smollm2-135m-instruct"))
    finished("model")
    data = make_data(model)
    print(f"The data are in {data[0].parent}.")
    finished("data")
    dtype, budget = plan(arguments)
    runs = {}
    for init in LABELS:
        folder = output_dir / init
        runs[init] = execute(command(init, model, data, folder, dtype, budget), folder)
        finished(LABELS[init])
    report(runs, seconds, budget, output_dir)


def take(output_dir: Path) -> None:
    """Mark a folder as the demo's, whose runs are deleted when it is run again; one with something else is refused."""
    mark = output_dir / MARK
    if output_dir.is_dir() and any(output_dir.iterdir()) and not mark.exists():
        sys.exit(f"{output_dir} holds something that no demo wrote and that could be lost. Give another --output_dir.")
    output_dir.mkdir(parents=True, exist_ok=True)
    mark.touch()


if __name__ == "__main__":
    main()
