"""Compare initialisations on equal terms: the same model, data, order, scaling, targets, rank and budget for all.

    python benchmarks/compare_inits.py --design benchmarks/designs/gsm8k.json --output benchmarks/results/gsm8k.jsonl \
        --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl \
        --prompt_column question --completion_column answer --block_size 192 --dtype bfloat16

Model and data are given as for `scripts/run_clm.py`; or `--held_out functions` in their place takes a model and data
that every machine can have. The design is a JSON file: settings that all runs share, and blocks of cells, each of which
is every combination of its methods, learning rates, ranks, seeds and numbers of steps:

    {"batch_size": 8, ..., "blocks": [{"name": "coarse", "why": "...", "methods": ["lora", "lora_da"],
     "learning_rates": [1e-4, 1e-3], "ranks": [8], "seeds": [0], "steps": [100]}]}

`learning_rates` may be {"best_of": "coarse", "times": [0.5, 1, 2]}: multiples of the rate with the lowest final loss
that the method had in that block. A block may change a shared setting, and set "settings", which go to LoRADAConfig
where the method is this package's: one set of them, or a list of sets to compare. With 0 steps there is no training:
the loss at step 0 is all that is measured.

Each finished cell is a line of the output, with all that it takes to run it again. Cells that are there are not run
again, so the command can be stopped at any time and goes on when it is given again. Cells that differ only in learning
rate or steps, in that A is frozen or the start reset, use one initialisation if they follow each other. With
`--statistics FOLDER` this package's statistics stay there, 0.65 GB for each seed and number of samples of a model with
135 million weights, until the folder is removed, and cells with other ranks or settings are solved from them; the time
of those is not reported. Peak memory is to be compared only between cells that ran with `--isolate`. `--plan` says what
is left and about how long it takes, by what was measured so far. `report.py` makes tables and plots of the lines.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from initialization_cost import machine, package_digest, peak_mib, reset_peak
from inits import (
    FROZEN,
    HALF,
    MERGED,
    METHODS,
    OWN,
    READ_SAMPLES,
    RESET,
    Setup,
    change,
    made_by,
    make_adapter,
    target_modules,
    why_missing,
)
from movement import Factors, movement, read_factors
from report import wilson_interval
from torch import Tensor, nn
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lora_da_hf import LoRADAConfig, LoRADAError
from lora_da_hf.errors import ConfigError
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.batches import sample_length
from lora_da_hf.statistics.token_masks import IGNORED_LABEL
from lora_da_hf.training.arguments import setting
from lora_da_hf.training.text_data import choose_block_size, load_model

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))
import demo  # noqa: E402 - a script, not a package
import run_clm  # noqa: E402

SHARED: dict[str, Any] = {
    "batch_size": 8,
    "alpha": 16,
    "use_rslora": True,
    "num_samples": 256,
    "reads": "drawn",
    "warmup": 0.03,
    "max_grad_norm": 1.0,
    "evaluations": 4,
    "num_train": None,
    "accuracy_samples": 0,
    "max_new_tokens": 256,
    "answer_pattern": r"####\s*(\S+)",
    "settings": {},
}
"""Settings of all cells, with their defaults. ``reads``, of methods whose start depends on data, says which
``num_samples`` they read: ``drawn`` from the training samples, whatever the order of training, or the ``first``, which
training begins with (what was run before the setting was there: its draw and the order came from one seed).
``evaluations`` are spread over the steps, beside the one at step 0;
``num_train`` samples are drawn from the training set by the seed (None: all); ``accuracy_samples`` answers are
generated at the end and compared in what the pattern finds last in them."""

READS = {"drawn": 1000, "first": 0}
"""What is added to a cell's seed for the draw of the samples that a method reads; training draws its order by the seed
itself."""

TRAINING = (
    "learning_rate",
    "steps",
    "warmup",
    "max_grad_norm",
    "evaluations",
    "accuracy_samples",
    "max_new_tokens",
    "answer_pattern",
)
"""Settings of a cell that its initialisation does not depend on."""

STARTS_ELSEWHERE = {*RESET, *HALF, *MERGED}
"""Methods whose loss at step 0 is not that of the start that they are made from."""

PRODUCT = {"method": "methods", "learning_rate": "learning_rates", "rank": "ranks", "seed": "seeds", "steps": "steps"}

HELD_OUT = ("modules", "functions")
"""What can be held out of the demo's data."""


@dataclass
class CompareArguments:
    """What is run, and where results go."""

    design: str = setting("", "The design of the comparison, a JSON file.")
    output: str = setting("", "Where results are added, one line each.")
    blocks: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Run these blocks of the design alone."}
    )
    hours: float | None = setting(None, "Start no cell after this many hours.")
    max_cells: int | None = setting(None, "Run this many cells at most.")
    held_out: str | None = setting(
        None,
        "Compare on the model and the data of `make demo`, in bfloat16, on up to 128 functions of Python's standard "
        "library that are held out: whole `modules`, or `functions` of modules that training sees.",
    )
    statistics: str | None = setting(
        None, "Keep this package's statistics in this folder, for cells with other ranks or settings."
    )
    isolate: bool = setting(
        False,
        "Run each cell in a process of its own, so that its peak memory is its own too; costs its start each time.",
    )
    plan: bool = setting(False, "Say what is left to run and how long it takes, and run nothing.")


# ---- the design


def read_design(path: str | Path) -> dict[str, Any]:
    """Read and check a design.

    Raises:
        ConfigError: if a name or a method is not known, a block lacks something or takes rates from none before it, or
            LoRADAConfig refuses settings.
    """
    design = json.loads(Path(path).read_text(encoding="utf-8"))
    names = {"name", "why", *PRODUCT.values(), *SHARED}
    unknown = set(design) - {"blocks", "why", *SHARED}
    earlier: list[str] = []
    for block in design.get("blocks", []):
        unknown |= set(block) - names
        missing = {"name", *PRODUCT.values()} - set(block)
        if missing:
            raise ConfigError(f"{path}: block {block.get('name')!r} lacks {', '.join(sorted(missing))}.")
        unknown |= set(block["methods"]) - {*METHODS, *FROZEN, *RESET, *HALF, *MERGED}
        rates = block["learning_rates"]
        if isinstance(rates, dict):
            unknown |= {rates.get("by", "final_loss")} - {"final_loss", "best_loss"}
        if isinstance(rates, dict) and rates["best_of"] not in earlier:
            raise ConfigError(
                f"{path}: block {block['name']!r} takes the best rates of {rates['best_of']!r}, which is none of the "
                "blocks before it with one set of settings."
            )
        for settings in sets_of_settings(design, block):
            LoRADAConfig.from_dict(settings)
        unknown |= {block.get("reads", design.get("reads", "drawn"))} - set(READS)
        if len(sets_of_settings(design, block)) == 1:
            earlier.append(block["name"])
    if unknown or not design.get("blocks"):
        raise ConfigError(f"{path}: {', '.join(sorted(unknown)) or 'blocks'} is not known or missing in a design.")
    return design


def sets_of_settings(design: dict[str, Any], block: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of LoRADAConfig that a block compares."""
    settings = block.get("settings", design.get("settings", {}))
    return settings if isinstance(settings, list) else [settings]


def cells_of(
    design: dict[str, Any],
    block: dict[str, Any],
    records: list[dict[str, Any]],
    without: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the settings of each cell of a block: none of a method that diverged at each rate it has its own from.

    Args:
        design: All of it.
        block: One of its blocks.
        records: Results so far, which the best learning rates are taken from.
        without: Methods that are left out.

    Raises:
        ConfigError: if the best learning rate of a method is not known yet.
    """
    shared = {name: block.get(name, design.get(name, default)) for name, default in SHARED.items()}
    cells: list[dict[str, Any]] = []
    sets = sets_of_settings(design, block)
    rates = {method: rates_of(method, design, block, records) for method in block["methods"] if method not in without}
    starts = itertools.product(block["ranks"], block["seeds"], sets, rates)  # cells of one start in a row
    for rank, seed, settings, method in starts:
        for steps, rate in itertools.product(block["steps"], rates[method]):
            cell = {"method": method, "rank": rank, "steps": steps, "seed": seed, "learning_rate": rate}
            cell |= {**shared, "settings": settings if made_by(method) in OWN else {}}
            if made_by(method) not in READ_SAMPLES:
                del cell["reads"]
            if cell not in cells:
                cells.append(cell)
    return cells


def rates_of(method: str, design: dict[str, Any], block: dict[str, Any], records: list[dict[str, Any]]) -> list[float]:
    """Return the learning rates that a block has for a method."""
    rates = block["learning_rates"]
    if isinstance(rates, dict):
        earlier = next(other for other in design["blocks"] if other["name"] == rates["best_of"])
        cells = cells_of(design, {**earlier, "methods": [method]}, records)
        if not cells and method in earlier["methods"]:
            return []  # it diverged before
        best = best_rate(cells, records, method, rates.get("by", "final_loss"))
        return [] if best is None else [float(f"{best * times:.3g}") for times in rates["times"]]
    return rates


def best_rate(
    cells: list[dict[str, Any]], records: list[dict[str, Any]], method: str, which: str = "final_loss"
) -> float | None:
    """Return the learning rate with the lowest mean loss of a method among some cells; None if all diverged.

    Args:
        cells: Those that are looked at.
        records: Results so far.
        method: The method.
        which: ``final_loss``, or ``best_loss``: the lowest on the way, where few samples are seen several times.

    Raises:
        ConfigError: if one of them was not run yet.
    """
    found: dict[float, list[float]] = {}
    for cell in cells:
        if cell["method"] == method:
            losses = [record[which] for record in records if is_of(record, cell)]
            if not losses:
                raise ConfigError(f"The best learning rate of {method} is not known before its cells are run.")
            found.setdefault(cell["learning_rate"], []).extend(math.inf if x is None else x for x in losses)
    if not found:
        raise ConfigError(f"The block that the best learning rate is taken from has no cell of {method}.")
    best = min(found, key=lambda rate: statistics.fmean(found[rate]))
    return None if math.isinf(statistics.fmean(found[best])) else best


def is_of(record: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Tell whether a record is that of a cell, whatever the model and the data."""
    return all(record["cell"].get(name) == value for name, value in cell.items())


def key_of(cell: dict[str, Any], subject: dict[str, Any]) -> str:
    """Return what names a cell: a hash of its settings, of the model and of the data."""
    return hashlib.sha256(json.dumps([cell, subject], sort_keys=True).encode()).hexdigest()[:16]


# ---- the lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the finished cells. A last line that was cut off, by a kill, is taken off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def add_line(path: Path, record: dict[str, Any]) -> None:
    """Add a finished cell, so that it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ---- model and data


@dataclass(kw_only=True)
class Subject:
    """Model and data, which all cells share.

    Attributes:
        arguments: How the model is loaded.
        tokenizer: Its tokenizer.
        train: Training samples.
        validation: Samples that no method reads.
        facts: What identifies them.
        weights_sha256: Of the base model, whose name alone is in the facts.
        statistics: Where this package's statistics of the samples are kept; None: nowhere.
    """

    arguments: run_clm.NamedModelArguments
    tokenizer: Any
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    facts: dict[str, Any]
    weights_sha256: str
    statistics: Path | None = None

    @classmethod
    def load(
        cls, arguments: run_clm.NamedModelArguments, data: run_clm.DataArguments, statistics: str | None = None
    ) -> Subject:
        """Load the data as `run_clm.py` does."""
        training = SimpleNamespace(do_train=True, do_eval=True, data_seed=0)
        model, tokenizer = load_model(arguments.model_name_or_path, arguments)
        block_size = choose_block_size(data.block_size, model, tokenizer)
        rows = run_clm.load_rows(data, arguments, training)
        samples = run_clm.prepare_samples(rows, tokenizer, block_size, SimpleNamespace(data=data, training=training))
        parts = {name: [dict(sample) for sample in split] for name, split in samples.items()}
        facts = {
            "model": Path(arguments.model_name_or_path).name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "block_size": block_size,
            **{name: len(part) for name, part in parts.items()},
            "data_sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
        }
        weights = base_model_facts(model)["weights_sha256"]
        kept = None
        if statistics is not None:
            of_these = json.dumps([facts, weights, package_digest()], sort_keys=True)
            kept = Path(statistics) / hashlib.sha256(of_these.encode()).hexdigest()[:16]
        return cls(
            arguments=arguments, tokenizer=tokenizer, facts=facts, weights_sha256=weights, statistics=kept, **parts
        )

    def load_model(self) -> nn.Module:
        """Load a fresh model: some methods change its weights."""
        return load_model(self.arguments.model_name_or_path, self.arguments)[0]


# ---- one cell


def training_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class Start:
    """An initialised model.

    Attributes:
        model: It, with trainable parameters in float32.
        setup: What it was made of.
        notes: What the method noted.
        cost: Seconds and memory of its initialisation.
        loss: That on the validation samples, once it was measured.
    """

    model: nn.Module
    setup: Setup
    notes: dict[str, Any]
    cost: dict[str, Any]
    loss: float | None = None


class LastStart:
    """The initialised model of the cell before, kept on the CPU for cells that start from the same."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.kept: Start | None = None

    def get(self, cell: dict[str, Any], subject: Subject) -> tuple[Start, bool]:
        """Return a copy of the start of a cell, and whether it had been made before."""
        method = made_by(cell["method"])
        made = {**{name: value for name, value in cell.items() if name not in TRAINING}, "method": method}
        key = json.dumps(made, sort_keys=True)
        reused = key == self.key and self.kept is not None
        if not reused:
            self.kept = None
            self.kept, self.key = make_start({**cell, "method": method}, subject), key
        assert self.kept is not None
        model, on_optimizer = copy.deepcopy(
            (self.kept.model, self.kept.setup.on_optimizer)
        )  # which know its parameters
        change(model, cell["method"], cell["seed"])
        setup = dataclasses.replace(self.kept.setup, on_optimizer=on_optimizer)
        loss = None if cell["method"] in STARTS_ELSEWHERE else self.kept.loss
        return dataclasses.replace(self.kept, model=model.to(training_device()), setup=setup, loss=loss), reused

    def put_aside(self, cell: dict[str, Any]) -> dict[str, Factors] | None:
        """Return the adapter that was made from data, if a cell's method put a plain one in its place."""
        assert self.kept is not None
        return read_factors(self.kept.model) if cell["method"] in RESET else None

    def note_loss(self, cell: dict[str, Any], loss: float | None) -> None:
        """Keep the loss that the start of a cell was found to have, for those who get it next."""
        assert self.kept is not None
        if cell["method"] not in STARTS_ELSEWHERE:
            self.kept.loss = loss


def make_start(cell: dict[str, Any], subject: Subject) -> Start:
    """Initialise, and move the model to the CPU."""
    device = training_device()
    base = subject.load_model().to(device)
    samples = subject.train
    if cell["num_train"] is not None:
        samples = random.Random(cell["seed"]).sample(samples, cell["num_train"])
    setup = Setup(
        model=base,
        samples=samples,
        collate=lambda batch: {name: value.to(device) for name, value in pad_samples(batch).items()},
        lora={
            "r": cell["rank"],
            "lora_alpha": cell["alpha"],
            "use_rslora": cell["use_rslora"],
            "target_modules": target_modules(base),
        },
        seed=cell["seed"],
        samples_seed=cell["seed"] + READS[cell.get("reads", "drawn")],
        num_samples=cell["num_samples"],
        batch_size=cell["batch_size"],
        settings=cell["settings"],
        statistics=subject.statistics,
    )
    with Measured() as initialization:
        model, notes = make_adapter(cell["method"], setup)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Start(model=model.cpu(), setup=setup, notes=notes, cost=initialization.found)


def run_cell(cell: dict[str, Any], subject: Subject, last: LastStart) -> dict[str, Any]:
    """Initialise, train and evaluate.

    Returns:
        What was measured. Losses that are not finite are None.
    """
    start, reused = last.get(cell, subject)
    reused = reused or start.notes.get("solved_again", False)
    torch.manual_seed(cell["seed"])  # for dropout
    before = read_factors(start.model)
    with Measured() as training:
        found = train(start, cell, subject.validation)
    training.found["peak_mib"] = found.pop("peak_mib")
    last.note_loss(cell, found["losses"][0][1])
    is_trained = cell["steps"] > 0 and found["final_loss"] is not None
    accuracy = exact_match(start.model, subject, cell) if cell["accuracy_samples"] else None
    return {
        **found,
        "movement": movement(before, read_factors(start.model), last.put_aside(cell)) if is_trained else None,
        "accuracy": accuracy,
        "initialization": {**start.cost, "reused": reused},
        "training": training.found,
        "notes": start.notes,
    }


class Measured:
    """Time and peak memory of a block; on a GPU the memory is the GPU's."""

    def __enter__(self) -> Measured:
        gc.collect()
        self.reset()
        self.start, self.start_mib = time.perf_counter(), self.peak()
        return self

    def __exit__(self, *_: Any) -> None:
        seconds = time.perf_counter() - self.start
        self.found = {"seconds": seconds, "start_mib": self.start_mib, "peak_mib": self.peak()}

    @staticmethod
    def reset() -> None:
        """Begin a new peak."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()

    @staticmethod
    def peak() -> float:
        """Return the peak since it was reset, in MiB."""
        return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_mib()


def batches_of(samples: list[Any], seed: int, size: int) -> Iterator[list[Any]]:
    """Yield batches for ever, in an order that the seed alone decides; each epoch has another one."""
    generator = random.Random(seed)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += generator.sample(range(len(samples)), len(samples))
        yield [samples[index] for index in order[:size]]
        order = order[size:]


def rate_at(step: int, cell: dict[str, Any]) -> float:
    """Return the share of the learning rate: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(cell["warmup"] * cell["steps"]))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, cell["steps"] - warmup))) / 2


def train(start: Start, cell: dict[str, Any], validation: list[Any]) -> dict[str, Any]:
    """Train with AdamW without weight decay, and evaluate on the way. Stops where the loss is no number any more.

    The peak memory is that of the steps, without the evaluations between them, whose batches are larger.
    """
    model, setup = start.model, start.setup
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cell["learning_rate"], weight_decay=0.0)
    for prepare in setup.on_optimizer:
        prepare(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, cell))
    marks = {round(cell["steps"] * part / cell["evaluations"]) for part in range(1, cell["evaluations"] + 1)}
    losses = [[0, evaluate(model, setup, validation) if start.loss is None else start.loss]]
    train_losses: list[float] = []
    seconds = peak = 0.0
    Measured.reset()
    batches = batches_of(setup.samples, cell["seed"], cell["batch_size"])
    for step in range(1, cell["steps"] + 1):
        begin = time.perf_counter()
        model.train()
        loss = model(**setup.collate(next(batches)), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, cell["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        train_losses.append(loss.item())
        seconds += time.perf_counter() - begin
        if not math.isfinite(train_losses[-1]):
            break
        if step in marks:
            peak = max(peak, Measured.peak())
            losses.append([step, evaluate(model, setup, validation)])
            Measured.reset()
    finished = math.isfinite(train_losses[-1]) if train_losses else True
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return {
        "losses": [[step, number(loss)] for step, loss in losses],
        "final_loss": number(losses[-1][1]) if finished else None,
        "best_loss": number(min((loss for _, loss in losses if math.isfinite(loss)), default=math.inf)),
        "train_losses": [number(round(loss, 5)) for loss in train_losses],
        "seconds_per_step": seconds / max(1, len(train_losses)),
        "trainable": sum(parameter.numel() for parameter in parameters),
        "peak_mib": max(peak, Measured.peak()),
        "optimizer_mib": sum(value.numel() * value.element_size() for value in state) / 2**20,
    }


def number(value: float) -> float | None:
    """Return a number that JSON knows: None for one that is not finite."""
    return value if math.isfinite(value) else None


def evaluate(model: nn.Module, setup: Setup, samples: list[Any]) -> float:
    """Return the mean loss over all labels of the samples."""
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(samples, key=sample_length, reverse=True)
    size = 2 * setup.batch_size
    with torch.no_grad():
        for start in range(0, len(ordered), size):
            batch = setup.collate(ordered[start : start + size])
            labels = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum().item())
            total += model(**batch, use_cache=False).loss.item() * labels
            count += labels
    return total / count


def exact_match(model: nn.Module, subject: Subject, cell: dict[str, Any]) -> dict[str, Any]:
    """Generate answers greedily, and count those in which the pattern finds what it finds in the right one.

    ``1,000.`` is as good as ``1000``.
    Samples whose right answer was cut before what the pattern finds are left out.
    """
    tokenizer, pattern = subject.tokenizer, re.compile(cell["answer_pattern"])
    model.eval()
    correct = total = 0
    for sample in subject.validation[: cell["accuracy_samples"]]:
        split = next(place for place, label in enumerate(sample["labels"]) if label != IGNORED_LABEL)
        prompt = torch.tensor([sample["input_ids"][:split]], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=cell["max_new_tokens"],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (output[0, split:], sample["input_ids"])]
        given, wanted = (found[-1] if (found := pattern.findall(text)) else None for text in texts)
        total += wanted is not None
        correct += None not in (given, wanted) and comparable(given) == comparable(wanted)
    low, high = wilson_interval(correct, total) if total else (0.0, 1.0)
    return {"correct": correct, "total": total, "low": low, "high": high}


def comparable(answer: str) -> str:
    """Return an answer without what makes no other number of it: commas between digits, and a full stop at the end."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", answer).removesuffix(".")


# ---- all of them


def seconds_of(cell: dict[str, Any], records: list[dict[str, Any]]) -> float | None:
    """Estimate how long a cell takes from the records of the same method, or of any: None if there is none.

    Cells that train are compared with such cells, and those that do not with their like.
    """
    like = [record for record in records if record["cell"]["method"] == cell["method"]]
    alike = [record for record in records if (record["cell"]["steps"] == 0) == (cell["steps"] == 0)]
    if not alike:
        return None
    per_step = statistics.median(record["training"]["seconds"] / max(1, record["cell"]["steps"]) for record in alike)
    start = statistics.median(record["initialization"]["seconds"] for record in like or records)
    return start + max(1, cell["steps"]) * per_step


def pending(
    design: dict[str, Any],
    records: list[dict[str, Any]],
    facts: dict[str, Any],
    blocks: list[str],
    without: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the cells that were not run, with the names of their blocks, in the order of the design."""
    for block in design["blocks"]:
        if blocks and block["name"] not in blocks:
            continue
        for cell in cells_of(design, block, records, without):
            if key_of(cell, facts) not in {record["key"] for record in records}:
                yield block["name"], cell


def show_plan(
    design: dict[str, Any],
    records: list[dict[str, Any]],
    facts: dict[str, Any],
    blocks: list[str],
    without: Collection[str],
) -> None:
    """Print how many cells of each block are left, and how long they take."""
    for block in design["blocks"]:
        if blocks and block["name"] not in blocks:
            continue
        try:
            left = [cell for _, cell in pending(design, records, facts, [block["name"]], without)]
        except ConfigError as error:
            print(f"{block['name']}: {error}")
            continue
        times = [seconds_of(cell, records) for cell in left]
        known = [seconds for seconds in times if seconds is not None]
        hours = f"{sum(known) / 3600:.1f} hours" if len(known) == len(left) else "no time is known yet"
        print(f"{block['name']}: {len(left)} cells left, {sum(cell['steps'] for cell in left)} steps, {hours}")


def run(arguments: CompareArguments, subject: Subject, command: list[str]) -> None:
    """Run what is left, a cell at a time; each line names the command that it was run with."""
    design, output, begin = read_design(arguments.design), Path(arguments.output), time.perf_counter()
    missing = say_what_is_missing(design, arguments.blocks)
    last, num_run = LastStart(), 0
    if arguments.plan:
        show_plan(design, of_subject(read_lines(output), subject.facts), subject.facts, arguments.blocks, missing)
        return
    while True:
        records = of_subject(read_lines(output), subject.facts)
        found = next(pending(design, records, subject.facts, arguments.blocks, missing), None)
        if found is None or num_run == arguments.max_cells or is_over(begin, arguments.hours):
            name_the_diverged(design, records, arguments.blocks, missing)
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
        shown = {name: cell[name] for name in PRODUCT}
        print(f"{block} {shown}: {result['losses'][0][1]} -> {result['final_loss']}", file=sys.stderr, flush=True)


def without_folders(command: list[str]) -> list[str]:
    """Return a command line with the names alone of what is given by its whole path, which only one machine has."""
    return [Path(one).name if Path(one).is_absolute() else one for one in command]


def say_what_is_missing(design: dict[str, Any], blocks: list[str]) -> set[str]:
    """Return the methods of some blocks that PEFT lacks here, and say why."""
    chosen = [block for block in design["blocks"] if not blocks or block["name"] in blocks]
    reasons = {method: why_missing(method) for block in chosen for method in block["methods"]}
    for method, reason in reasons.items():
        if reason is not None:
            print(f"{method} is left out: {reason}", file=sys.stderr, flush=True)
    return {method for method, reason in reasons.items() if reason is not None}


def name_the_diverged(
    design: dict[str, Any], records: list[dict[str, Any]], blocks: list[str], without: Collection[str]
) -> None:
    """Say which methods have no cells in a block, since they diverged where it takes its rates from."""
    for block in design["blocks"]:
        rates = block["learning_rates"]
        if not isinstance(rates, dict) or (blocks and block["name"] not in blocks):
            continue
        for method in set(block["methods"]) - set(without):
            with contextlib.suppress(ConfigError):  # not known yet: the run was stopped before
                if not rates_of(method, design, block, records):
                    about = f"it diverged at every learning rate of {rates['best_of']}"
                    print(f"{method} has no cells in {block['name']}: {about}", file=sys.stderr, flush=True)


def code() -> dict[str, str | None]:
    """Return what identifies the code that a cell was run with: the digests count where the commit differs."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    contents = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return {
        "package_sha256": package_digest(),
        "benchmarks_sha256": hashlib.sha256(contents).hexdigest()[:16],
        "commit": found.stdout.strip() or None,
    }


def is_over(begin: float, hours: float | None) -> bool:
    """Tell whether the hours since a time are used up."""
    return hours is not None and time.perf_counter() - begin > hours * 3600


def run_apart(argv: list[str], output: Path, hours: float | None, max_cells: int | None) -> None:
    """Run the command again and again for one cell each, until it adds none."""
    begin, first, before = time.perf_counter(), len(read_lines(output)), -1
    while (now := len(read_lines(output))) > before and not is_over(begin, hours):
        if max_cells is not None and now - first >= max_cells:
            return
        before = now
        one = [sys.executable, __file__, *argv, "--isolate", "false", "--max_cells", "1"]  # the last of each counts
        subprocess.run(one, check=True)


def of_subject(records: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of this model and data."""
    return [record for record in records if record["subject"] == facts]


def keep_lines(path: Path, lines: list[str]) -> Path:
    """Write a file in one move, unless it is there as it should be."""
    content = "".join(lines).encode()
    if not path.exists() or path.read_bytes() != content:
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def take_those_of_the_demo(model: run_clm.NamedModelArguments, data: run_clm.DataArguments, held_out: str) -> None:
    """Fill in model and data of `make demo`, made if they are not there: by whole modules, or every 20th function."""
    model.model_name_or_path = str(demo.fetch_model(demo.CACHE / "smollm2-135m-instruct"))
    if model.dtype == "auto":
        model.dtype = "bfloat16"
    train, validation = demo.make_data(model.model_name_or_path)
    if held_out == "functions":
        lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
        train = keep_lines(train.with_name("most.jsonl"), [one for place, one in enumerate(lines, 1) if place % 20])
        validation = keep_lines(train.with_name("every_20th.jsonl"), lines[19::20])
    data.train_file, data.validation_file, data.max_eval_samples = str(train), str(validation), 128
    data.prompt_column, data.completion_column, data.block_size = "prompt", "completion", demo.MAX_TOKENS


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: The command line without the program's name; None: the process's own.
    """
    parser = HfArgumentParser((CompareArguments, run_clm.NamedModelArguments, run_clm.DataArguments))
    arguments, model, data = parser.parse_args_into_dataclasses(argv)
    if arguments.held_out not in (None, *HELD_OUT):
        parser.error(f"--held_out must be {' or '.join(HELD_OUT)}, got {arguments.held_out}")
    given = model.model_name_or_path or data.dataset_name or data.train_file or data.validation_file
    if arguments.held_out and given:
        parser.error(f"--held_out takes model and data of the demo: leave {given} out")
    if not (arguments.design and arguments.output and (arguments.held_out or model.model_name_or_path)):
        parser.error("--design, --output and --model_name_or_path (or --held_out) are needed")
    if arguments.held_out:
        take_those_of_the_demo(model, data, arguments.held_out)
    run_clm.check_columns_and_sizes(parser.error, data)
    command = sys.argv[1:] if argv is None else argv
    if arguments.isolate:
        run_apart(command, Path(arguments.output), arguments.hours, arguments.max_cells)
        return
    set_verbosity_error()
    disable_progress_bar()
    run(arguments, Subject.load(model, data, arguments.statistics), command)


if __name__ == "__main__":
    try:
        main()
    except LoRADAError as error:
        sys.exit(f"compare_inits.py: error: {error}")
