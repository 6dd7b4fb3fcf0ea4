"""One cell of a comparison: load model and data, initialise, train, evaluate."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from designs import READS, key_of
from inits import MERGED, RESET, Setup, change, linear_layers, made_by, make_adapter, make_anew, target_modules
from measuring import REPOSITORY, package_digest, peak_mib, reset_peak
from peft.optimizers import create_loraplus_optimizer
from report import TRIED
from tasks import TASKS, Task
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.batches import sample_length
from lora_da_hf.statistics.token_masks import IGNORED_LABEL
from lora_da_hf.training.text import choose_block_size, load_model

sys.path.insert(0, str(REPOSITORY / "scripts"))
import demo
import run_clm

TRAINING = ("learning_rate", "steps", "warmup", "schedule", "max_grad_norm", "evaluations", *TRIED)
"""Settings of a cell that its initialisation does not depend on."""

STARTS_ELSEWHERE = {*RESET, *MERGED}
"""Methods whose loss at step 0 is not that of the start that they are made from."""


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
        kinds: Classes of its linear layers.
        statistics: Where this package's statistics of the samples are kept; None: nowhere.
        task: What is learnt other than to predict text, with a linear decay of the rate and batches of like lengths.
        choice: Samples of the task that a rate may be chosen by.
        num_labels: Of the task.
        unlike: Text unlike the training's, whose loss says what is forgotten.
        checkpoints: Where cells that are not finished are kept, and every how many minutes; None: nowhere.
    """

    arguments: run_clm.NamedModelArguments
    tokenizer: Any
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    facts: dict[str, Any]
    weights_sha256: str
    kinds: frozenset[type[nn.Module]]
    statistics: Path | None = None
    task: Task | None = None
    choice: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_labels: int = 0
    unlike: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    checkpoints: tuple[Path, float] | None = None

    @classmethod
    def load_task(cls, name: str, folder: Path) -> Subject:
        """Load the data of a task, and its model."""
        task = TASKS[name]
        parts, num_labels = task.samples(folder)
        choice = parts.pop("choice")
        facts = {
            "model": folder.name,
            "dtype": "float32",
            "task": name,
            **{part: len(samples) for part, samples in parts.items()},
            "data_sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
        }
        model = task.load_model(folder, num_labels)
        return cls(
            arguments=run_clm.NamedModelArguments(model_name_or_path=str(folder)),
            tokenizer=None,
            facts=facts,
            weights_sha256=base_model_facts(model).weights_sha256,
            kinds=frozenset(map(type, linear_layers(model).values())),
            task=task,
            choice=choice,
            num_labels=num_labels,
            **parts,
        )

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
        weights = base_model_facts(model).weights_sha256
        kept = None
        if statistics is not None:
            of_these = json.dumps([facts, weights, package_digest()], sort_keys=True)
            kept = Path(statistics) / hashlib.sha256(of_these.encode()).hexdigest()[:16]
        return cls(
            arguments=arguments,
            tokenizer=tokenizer,
            facts=facts,
            weights_sha256=weights,
            kinds=frozenset(map(type, linear_layers(model).values())),
            statistics=kept,
            **parts,
        )

    def load_model(self, seed: int) -> nn.Module:
        """Load a fresh model: some methods change its weights. The seed decides a new head."""
        if self.task is not None:
            torch.manual_seed(seed)
            return self.task.load_model(Path(self.arguments.model_name_or_path), self.num_labels)
        return load_model(self.arguments.model_name_or_path, self.arguments)[0]

    def read_unlike(self, count: int) -> None:
        """Read functions of Python's standard library, which are to be unlike the training's text."""
        rows = demo.make_data(str(self.arguments.model_name_or_path))[1].read_text(encoding="utf-8").splitlines()
        texts = [row["prompt"] + row["completion"] for row in map(json.loads, rows[:count])]
        self.unlike = [{"input_ids": ids, "labels": ids} for ids in self.tokenizer(texts)["input_ids"]]


# ---- its start


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
        unlike: The base's loss on text unlike the training's.
    """

    model: nn.Module
    setup: Setup
    notes: dict[str, Any]
    cost: dict[str, Any]
    loss: float | None = None
    unlike: float | None = None


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
        model = copy.deepcopy(self.kept.model)
        change(model, cell["method"], cell["seed"])
        loss = None if cell["method"] in STARTS_ELSEWHERE else self.kept.loss
        return dataclasses.replace(self.kept, model=model.to(training_device()), loss=loss), reused

    def note_loss(self, cell: dict[str, Any], loss: float | None) -> None:
        """Keep the loss that the start of a cell was found to have, for those who get it next."""
        assert self.kept is not None
        if cell["method"] not in STARTS_ELSEWHERE:
            self.kept.loss = loss


def make_start(cell: dict[str, Any], subject: Subject) -> Start:
    """Initialise, and move the model to the CPU."""
    device = training_device()
    base = subject.load_model(cell["seed"]).to(device)
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
            "task_type": "CAUSAL_LM" if subject.task is None else subject.task.kind,
            "target_modules": target_modules(base),
            "fan_in_fan_out": Conv1D in subject.kinds,
        },
        seed=cell["seed"],
        samples_seed=cell["seed"] + READS[cell.get("reads", "drawn")],
        num_samples=cell["num_samples"],
        batch_size=cell["batch_size"],
        settings=cell["settings"],
        statistics=subject.statistics,
    )
    unlike = evaluate(base, setup, subject.unlike) if subject.unlike else None
    with Measured() as initialization:
        model, notes = make_adapter(cell["method"], setup)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Start(model=model.cpu(), setup=setup, notes=notes, cost=initialization.found, unlike=unlike)


def run_cell(cell: dict[str, Any], subject: Subject, last: LastStart) -> dict[str, Any]:
    """Initialise, train and evaluate.

    Returns:
        What was measured. Losses that are not finite are None.
    """
    start, reused = last.get(cell, subject)
    reused = reused or start.notes.get("solved_again", False)
    torch.manual_seed(cell["seed"])  # for dropout
    with Measured() as training:
        found = train(start, cell, subject)
    training.found["peak_mib"] = found.pop("peak_mib")
    training.found["seconds"] += found.pop("seconds_before")
    last.note_loss(cell, found["losses"][0][1])
    if subject.unlike:
        found["forgetting"] = [start.unlike, number(evaluate(start.model, start.setup, subject.unlike))]
    return {
        **found,
        "initialization": {**start.cost, "reused": reused},
        "training": training.found,
        "notes": start.notes,
    }


class Measured:
    """Time and peak memory of a block; on a GPU the memory is the GPU's."""

    def __enter__(self) -> Measured:
        gc.collect()
        reset_peak()
        self.start, self.start_mib = time.perf_counter(), peak_mib()
        return self

    def __exit__(self, *_: Any) -> None:
        seconds = time.perf_counter() - self.start
        self.found = {"seconds": seconds, "start_mib": self.start_mib, "peak_mib": peak_mib()}


def batches_of(samples: list[Any], seed: int, size: int, *, by_length: bool = False) -> Iterator[list[Any]]:
    """Yield batches for ever, in an order that the seed alone decides; each epoch has another one.

    By length, each sixteen batches are put together again of samples that are alike in it, which saves padding.
    """
    generator = random.Random(seed)
    if by_length:
        for many in batches_of(samples, seed, size * 16):
            ordered = sorted(many, key=sample_length)
            yield from generator.sample([ordered[start : start + size] for start in range(0, len(many), size)], 16)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += generator.sample(range(len(samples)), len(samples))
        yield [samples[index] for index in order[:size]]
        order = order[size:]


class Checkpoint:
    """A cell that is not finished, in a file from which it goes on after it was stopped, and ends as if it was not."""

    def __init__(self, subject: Subject, cell: dict[str, Any], parameters: list[nn.Parameter], *parts: Any) -> None:
        self.parameters, self.parts = parameters, parts
        output, minutes = subject.checkpoints or (None, math.inf)
        self.path = output and output.with_name(f"{output.stem}.{key_of(cell, subject.facts)}.pt")
        self.path = None if cell["anew_after"] else self.path  # the base's weights, which then change, are not kept
        self.every, self.begun, self.before = 60 * minutes, time.monotonic(), 0.0
        self.saved = self.begun

    def load(self) -> dict[str, Any] | None:
        """Restore all, and return how far the cell was; None if there is no file."""
        if self.path is None or not self.path.exists():
            return None
        found = torch.load(self.path, weights_only=True, map_location="cpu")
        for parameter, value in zip(self.parameters, found["parameters"], strict=True):
            parameter.data.copy_(value)
        for part, state in zip(self.parts, found["parts"], strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(found["random"][0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(found["random"][1:])
        self.before = found["seconds"]
        return found["at"]

    def save(self, at: dict[str, Any]) -> None:
        """Write how far the cell is, if it is time to."""
        now = time.monotonic()
        if self.path is None or now - self.saved < self.every:
            return
        more = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        content = {
            "at": at,
            "seconds": self.before + now - self.begun,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "parts": [part.state_dict() for part in self.parts],
            "random": [torch.get_rng_state(), *more],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial := self.path.with_suffix(".partial"))
        partial.replace(self.path)
        self.saved = now


def rate_at(step: int, cell: dict[str, Any], *, linear: bool = False) -> float:
    """Return the share of the learning rate: linear warm-up, then a cosine, or a line, down to zero."""
    warmup = max(1, round(cell["warmup"] * cell["steps"]))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, cell["steps"] - warmup)
    return 1 - done if linear else (1 + math.cos(math.pi * done)) / 2


def train(start: Start, cell: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """Train with AdamW without weight decay, and evaluate on the way. Stops where the loss is no number any more.

    The peak memory is that of the steps, without the evaluations between them, whose batches are larger.
    """
    model, setup, task = start.model, start.setup, subject.task
    options: dict[str, Any] = {"use_cache": False} if task is None else {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = {"lr": cell["learning_rate"], "loraplus_lr_ratio": cell["lora_plus"] or 1}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **rates, weight_decay=0.0)
    linear = (cell["schedule"] or ("cosine" if task is None else "linear")) == "linear"
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, cell, linear=linear))
    checkpoint = Checkpoint(subject, cell, parameters, optimizer, schedule)
    kept = checkpoint.load()
    at = kept or {"losses": [], "scores": [], "train_losses": [], "seconds": 0.0, "peak": 0.0, "resumed": []}

    def look(step: int) -> None:
        if task is None:
            loss = evaluate(model, setup, subject.validation) if step or start.loss is None else start.loss
        else:
            loss, score = task.evaluate(model, setup.collate, subject.validation)
            at["scores"].append([step, score])
        at["losses"].append([step, loss])

    if kept is None:
        look(0)
    else:
        at["resumed"].append(len(at["train_losses"]))
    marks = {round(cell["steps"] * part / cell["evaluations"]) for part in range(1, cell["evaluations"] + 1)}
    reset_peak()
    batches = batches_of(setup.samples, cell["seed"], cell["batch_size"], by_length=task is not None)
    for step in range(1, cell["steps"] + 1):
        batch = next(batches)
        if step <= len(at["train_losses"]):
            continue  # it was trained on before the cell was stopped
        if step == round((cell["anew_after"] or 0) * cell["steps"]) + 1 > 1:
            with Measured() as anew:
                make_anew(model, cell["method"], setup, optimizer)
            at["anew"] = anew.found["seconds"]
        begin = time.perf_counter()
        model.train()
        loss = model(**setup.collate(batch), **options).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, cell["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        at["train_losses"].append(loss.item())
        at["seconds"] += time.perf_counter() - begin
        if not math.isfinite(at["train_losses"][-1]):
            break
        if step in marks:
            at["peak"] = max(at["peak"], peak_mib())
            look(step)
            reset_peak()
        checkpoint.save(at)
    losses, train_losses = at["losses"], at["train_losses"]
    finished = math.isfinite(train_losses[-1]) if train_losses else True
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    found: dict[str, Any] = {"resumed": at["resumed"]} if kept else {}
    found |= {"anew_seconds": at["anew"]} if "anew" in at else {}
    if task is not None:
        choice = [number(value) for value in task.evaluate(model, setup.collate, subject.choice)]
        found |= {"metric": task.metric, "scores": at["scores"], "choice": choice}
    return {
        **found,
        "losses": [[step, number(loss)] for step, loss in losses],
        "final_loss": number(losses[-1][1]) if finished else None,
        "best_loss": number(min((loss for _, loss in losses if math.isfinite(loss)), default=math.inf)),
        "train_losses": [number(round(loss, 5)) for loss in train_losses],
        "seconds_per_step": at["seconds"] / max(1, len(train_losses)),
        "seconds_before": checkpoint.before,
        "trainable": sum(parameter.numel() for parameter in parameters),
        "peak_mib": max(at["peak"], peak_mib()),
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
