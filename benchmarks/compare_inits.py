"""Compare initialisations on equal terms: the same model, data, order, scaling, targets, rank and budget for all.

    python benchmarks/compare_inits.py --model_name_or_path MODEL --train_file train.jsonl \
        --validation_file validation.jsonl --methods lora lora_da pissa eva \
        --learning_rates 1e-4 2e-4 1e-3 --seeds 0 1 2

It trains every combination and ends in tables and pictures, which `report.py` makes, beside `--output`. Model and data
are given as for `scripts/run_clm.py`; or `--held_out functions` in their place takes those that every machine can have.

`--design FILE` in place of `--methods` runs a larger comparison. It is a JSON file with settings that all runs share
(`designs.SHARED` lists them with their defaults) and blocks, each with methods, rates and so on of its own:

    {"batch_size": 8, ..., "blocks": [{"name": "coarse", "why": "...", "methods": ["lora", "lora_da"],
     "learning_rates": [1e-4, 1e-3], "ranks": [8], "seeds": [0], "steps": [100]}]}

There `learning_rates` may be {"best_of": "coarse", "times": [0.5, 1, 2]}: multiples of the rate with the lowest final
loss that the method had in that block. A block may change a shared setting, and set "settings", which go to
LoRADAConfig where the method is this package's: one set of them, or a list of sets to compare.

Each finished run is a line of the output, and is not run again: give the command again after you stopped it, or with
more methods, rates or seeds. A run that was stopped goes on from the last of its checkpoints, which are beside the
output. With 0 steps the loss at step 0 is all that is measured. Runs that differ only in learning rate or steps, in
that A is frozen or the start reset, use one initialisation if they follow each other. With `--statistics FOLDER` this
package's statistics stay there, 0.65 GB for each seed and number of samples of a model with 135 million weights, and
runs with other ranks or settings are solved from them; the time of those is not reported. Peak memory is to be compared
only between runs with `--isolate`.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib  # noqa: F401 - for the pictures: one that is missing is missed now, not after hours
import report
from cells import LastStart, Subject, demo, run_cell, run_clm
from designs import PRODUCT, SHARED, check_design, chosen_blocks, key_of, pending, read_design, shared_settings
from inits import FROZEN, METHODS, READ_SAMPLES, made_by, why_missing
from lines import add_line, of_subject, read_lines
from measuring import REPOSITORY, machine, package_digest
from tasks import fetch_model
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lora_da_hf import LoRADAError
from lora_da_hf.cli.verbs import explain
from lora_da_hf.config import setting
from lora_da_hf.errors import ConfigError


@dataclass
class CompareArguments:
    """What is run, and where results go."""

    output: str = setting("outputs/comparison.jsonl", "Where results are added, one line each.")
    methods: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": f"What is compared: {', '.join((*METHODS, *FROZEN))}."}
    )
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [2e-4, 1e-3])
    ranks: list[int] = dataclasses.field(default_factory=lambda: [16])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    steps: list[int] = dataclasses.field(default_factory=lambda: [100])
    batch_size: int = setting(SHARED["batch_size"], "Of training and of what a start reads.")
    alpha: int = setting(32, "LoRA's alpha.")
    use_rslora: bool = setting(False, "Scale by alpha over the root of the rank, not over the rank.")
    num_samples: int = setting(SHARED["num_samples"], "Training samples that a start reads.")
    evaluations: int = setting(SHARED["evaluations"], "On the way, spread over the steps.")
    design: str = setting("", "A JSON file that says what is compared, in place of the flags from --methods on.")
    blocks: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Run these blocks of the design alone."}
    )
    max_cells: int | None = setting(None, "Run this many cells at most.")
    held_out: Literal["modules", "functions"] | None = setting(
        None,
        "Compare on the model and the data of `make demo`, in bfloat16, on up to 128 functions of Python's standard "
        "library that are held out: whole `modules`, or `functions` of modules that training sees.",
    )
    task: Literal["sections", "sizes", "roles"] | None = setting(
        None, "Compare on a task with a head that is drawn at random, with MiniLM."
    )
    statistics: str | None = setting(
        None, "Keep this package's statistics in this folder, for cells with other ranks or settings."
    )
    isolate: bool = setting(
        False,
        "Run each cell in a process of its own, so that its peak memory is its own too; costs its start each time.",
    )
    unlike: int = setting(0, "Measure forgetting on this many functions of Python's standard library too.")
    checkpoint_minutes: float = setting(5.0, "Keep a cell this often beside the output, to go on if it is stopped.")
    plan: bool = setting(False, "Say what is left to run, and run nothing.")

    def read(self) -> dict[str, Any]:
        """Return the design: that of the file, or one block of what the flags say."""
        block = {name: getattr(self, name) for name in (*PRODUCT.values(), *SHARED) if hasattr(self, name)}
        if not self.design:
            return check_design({"blocks": [{"name": "flags", **block}]}, "--methods and the flags after it")
        said = [f"--{name}" for name, value in block.items() if value != getattr(CompareArguments(), name)]
        if said:
            raise ConfigError(f"{self.design} says what is compared: leave {', '.join(said)} out, or --design.")
        return read_design(self.design)


def show_plan(
    design: dict[str, Any],
    records: list[dict[str, Any]],
    blocks: list[str],
    without: Collection[str],
) -> None:
    """Print how many cells and steps of each block are left."""
    for block in chosen_blocks(design, blocks):
        try:
            left = [cell for _, cell in pending(design, records, [block["name"]], without)]
        except ConfigError as error:
            print(f"{block['name']}: {error}")
            continue
        print(f"{block['name']}: {len(left)} cells left, {sum(cell['steps'] for cell in left)} steps")


def run(arguments: CompareArguments, subject: Subject, command: list[str]) -> None:
    """Run what is left, a cell at a time; each line names the command that it was run with."""
    design, output = arguments.read(), Path(arguments.output)
    check_samples(design, arguments.blocks, subject)
    missing = say_what_is_missing(design, arguments.blocks, subject)
    last, num_run = LastStart(), 0
    while True:
        records = of_subject(read_lines(output), subject.facts, subject.weights_sha256)
        if arguments.plan:
            show_plan(design, records, arguments.blocks, missing)
            return
        found = next(pending(design, records, arguments.blocks, missing), None)
        if found is None or num_run == arguments.max_cells:
            return
        block, cell = found
        result = run_cell(cell, subject, last)
        num_run += 1
        about = {"key": key_of(cell, subject.facts), "block": block, "cell": cell, "subject": subject.facts}
        about |= {"isolated": arguments.max_cells == 1, "code": code()}
        about |= {"weights_sha256": subject.weights_sha256, "command": without_folders(command)}
        add_line(
            output,
            {
                **about,
                "machine": machine(),
                "reads_samples": made_by(cell["method"]) in READ_SAMPLES,
                **result,
            },
        )
        for kept in output.parent.glob(f"{output.stem}.{about['key']}.p*"):
            kept.unlink()
        shown = {name: cell[name] for name in PRODUCT}
        print(f"{block} {shown}: {result['losses'][0][1]} -> {result['final_loss']}", file=sys.stderr, flush=True)


def check_samples(design: dict[str, Any], blocks: list[str], subject: Subject) -> None:
    """Check that there are as many training samples as the blocks want, before any of them trains."""
    for block in chosen_blocks(design, blocks):
        shared = shared_settings(design, block)
        if (shared["num_train"] or 0) > len(subject.train):
            raise ConfigError(
                f"Block {block['name']!r} trains on {shared['num_train']} samples (num_train), and there are "
                f"{len(subject.train)}. Lower it, or give more data."
            )


def without_folders(command: list[str]) -> list[str]:
    """Return a command line with the names alone of what is given by its whole path, which only one machine has."""
    return [Path(one).name if Path(one).is_absolute() else one for one in command]


def say_what_is_missing(design: dict[str, Any], blocks: list[str], subject: Subject) -> set[str]:
    """Return the methods of some blocks that PEFT lacks here or for this model, and say why."""
    methods = [method for block in chosen_blocks(design, blocks) for method in block["methods"]]
    reasons = {method: why_missing(method, subject.kinds) for method in methods}
    for method, reason in reasons.items():
        if reason is not None:
            print(f"{method} is left out: {reason}", file=sys.stderr, flush=True)
    return {method for method, reason in reasons.items() if reason is not None}


def code() -> dict[str, str | None]:
    """Return what identifies the code that a cell was run with: the digest counts where the commit differs."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"package_sha256": package_digest(), "commit": found.stdout.strip() or None}


def run_apart(argv: list[str], output: Path, max_cells: int | None) -> None:
    """Run the command again and again for one cell each, until it adds none."""
    first, before = len(read_lines(output)), -1
    while (now := len(read_lines(output))) > before:
        if max_cells is not None and now - first >= max_cells:
            return
        before = now
        one = [sys.executable, __file__, *argv, "--isolate", "false", "--max_cells", "1"]  # the last of each counts
        if (code := subprocess.run(one, check=False).returncode) != 0:
            sys.exit(code)


def take_those_of_the_demo(model: run_clm.NamedModelArguments, data: run_clm.DataArguments, held_out: str) -> None:
    """Fill in model and data of `make demo`, made if they are not there: by whole modules, or every 20th function."""
    model.model_name_or_path = str(demo.fetch_model(demo.CACHE / "smollm2-135m-instruct"))
    if model.dtype == "auto":
        model.dtype = "bfloat16"
    train, validation = demo.make_data(model.model_name_or_path)
    if held_out == "functions":
        lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
        train, validation = train.with_name("most.jsonl"), train.with_name("every_20th.jsonl")
        train.write_text("".join(one for place, one in enumerate(lines, 1) if place % 20), encoding="utf-8")
        validation.write_text("".join(lines[19::20]), encoding="utf-8")
    data.train_file, data.validation_file, data.max_eval_samples = str(train), str(validation), 128
    data.prompt_column, data.completion_column, data.block_size = "prompt", "completion", demo.MAX_TOKENS


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: The command line without the program's name; None: the process's own.
    """
    parser = HfArgumentParser((CompareArguments, run_clm.NamedModelArguments, run_clm.DataArguments))
    arguments, model, data = parser.parse_args_into_dataclasses(argv)
    given = model.model_name_or_path or data.dataset_name or data.train_file or data.validation_file
    if (arguments.held_out or arguments.task) and given:
        parser.error(f"--held_out and --task have a model and data of their own: leave {given} out")
    own = arguments.held_out or arguments.task
    if arguments.task and arguments.unlike:
        parser.error("--unlike is for models of text: leave it out, or --task")
    if not (own or (model.model_name_or_path and (data.train_file or data.dataset_name))):
        parser.error("--model_name_or_path and --train_file (or --held_out, or --task) are needed")
    if not (arguments.methods or arguments.design):
        parser.error("--methods or --design is needed")
    chosen_blocks(arguments.read(), arguments.blocks)  # before model and data are loaded
    if arguments.held_out:
        take_those_of_the_demo(model, data, arguments.held_out)
    command = sys.argv[1:] if argv is None else argv
    if arguments.isolate:
        run_apart(command, Path(arguments.output), arguments.max_cells)
    else:
        set_verbosity_error()
        disable_progress_bar()
        if arguments.task:
            subject = Subject.load_task(arguments.task, fetch_model(demo.CACHE / "minilm-l6-v2"))
        else:
            subject = Subject.load(model, data, arguments.statistics)
        if arguments.unlike:
            subject.read_unlike(arguments.unlike)
        subject.checkpoints = Path(arguments.output), arguments.checkpoint_minutes
        run(arguments, subject, command)
    if not (arguments.plan or arguments.max_cells or arguments.task):  # of tasks, no_harm.py makes the tables
        report.main([arguments.output])


if __name__ == "__main__":
    try:
        main()
    except (LoRADAError, OSError) as error:
        sys.exit(f"compare_inits.py: error: {explain(error)}")
