"""Designs of comparisons: which cells there are, which of them were run, and the best rates of what was."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from inits import FROZEN, MERGED, METHODS, OWN, READ_SAMPLES, RESET, made_by

from lora_da_hf import LoRADAConfig
from lora_da_hf.errors import ConfigError

SHARED: dict[str, Any] = {
    "batch_size": 8,
    "alpha": 16,
    "use_rslora": True,
    "num_samples": 256,
    "reads": "drawn",
    "warmup": 0.03,
    "schedule": None,
    "max_grad_norm": 1.0,
    "evaluations": 4,
    "num_train": None,
    "lora_plus": None,
    "anew_after": None,
    "settings": {},
}
"""Settings of all cells, with their defaults. ``reads``, of methods whose start depends on data, says which
``num_samples`` they read: ``drawn`` from the training samples, whatever the order of training, or the ``first``, which
training begins with (what was run before the setting was there: its draw and the order came from one seed).
``schedule`` is ``linear`` or ``cosine`` (None: linear for tasks, a cosine for text).
``evaluations`` are spread over the steps, beside the one at step 0;
``num_train`` samples are drawn from the training set by the seed (None: all); ``lora_plus`` multiplies the rate of B
(LoRA+, arXiv 2402.12354); ``anew_after`` is the share of the steps after which the adapter is merged and made anew."""

READS = {"drawn": 1000, "first": 0}
"""What is added to a cell's seed for the draw of the samples that a method reads; training draws its order by the seed
itself."""

PRODUCT = {"method": "methods", "learning_rate": "learning_rates", "rank": "ranks", "seed": "seeds", "steps": "steps"}


# ---- the cells of a design


def read_design(path: str | Path) -> dict[str, Any]:
    """Read a design, and check it."""
    try:
        design = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a design: {error}.") from error
    if not isinstance(design, dict):
        raise ConfigError(f"{path} is no design: it holds a {type(design).__name__} where an object should be.")
    return check_design(design, path)


def check_design(design: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a design that is right.

    Raises:
        ConfigError: if a name or a method is not known, a block lacks something or takes rates from none before it, or
            LoRADAConfig refuses settings.
    """
    names = {"name", "why", *PRODUCT.values(), *SHARED}
    unknown = set(design) - {"blocks", "why", *SHARED}
    earlier: list[str] = []
    for block in design.get("blocks", []):
        unknown |= set(block) - names
        missing = {"name", *PRODUCT.values()} - set(block)
        if missing:
            raise ConfigError(f"{path}: block {block.get('name')!r} lacks {', '.join(sorted(missing))}.")
        unknown |= set(block["methods"]) - {*METHODS, *FROZEN, *RESET, *MERGED}
        rates = block["learning_rates"]
        if isinstance(rates, dict):
            unknown |= {rates.get("by", "final_loss")} - {"final_loss", "best_loss", "choice"}
        if isinstance(rates, dict) and rates["best_of"] not in earlier:
            raise ConfigError(
                f"{path}: block {block['name']!r} takes the best rates of {rates['best_of']!r}, which is none of the "
                "blocks before it with one set of settings."
            )
        for settings in sets_of_settings(design, block):
            LoRADAConfig(**settings)
        shared = shared_settings(design, block)
        unknown |= ({shared["reads"]} - set(READS)) | ({shared["schedule"]} - {None, "linear", "cosine"})
        for name, least in (("evaluations", 1), ("num_train", 1)):
            value = shared[name]
            if not (value is None and name == "num_train") and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{path}: block {block['name']!r} has {name} {value!r}: give {least} or more.")
        if len(sets_of_settings(design, block)) == 1:
            earlier.append(block["name"])
    if unknown or not design.get("blocks"):
        raise ConfigError(f"{path}: {', '.join(sorted(unknown)) or 'blocks'} is not known or missing in a design.")
    return design


def shared_settings(design: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the cells of a block share: its own, the design's or the default."""
    return {name: block.get(name, design.get(name, default)) for name, default in SHARED.items()}


def chosen_blocks(design: dict[str, Any], names: Collection[str]) -> list[dict[str, Any]]:
    """Return the blocks of these names, or all if there are none.

    Raises:
        ConfigError: if no block has a name.
    """
    blocks = design["blocks"]
    unknown = set(names) - {block["name"] for block in blocks}
    if unknown:
        there = ", ".join(block["name"] for block in blocks)
        raise ConfigError(f"--blocks: the design has no {', '.join(sorted(unknown))}, only {there}.")
    return [block for block in blocks if not names or block["name"] in names]


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

    Best learning rates are taken from the results so far. One that is not known yet is a ConfigError.
    """
    shared = shared_settings(design, block)
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

    ``which`` may be ``best_loss``, the lowest on the way, or ``choice``, that on the samples of a task to choose by.
    A cell that was not run yet is a ConfigError.
    """
    found: dict[float, list[float]] = {}
    for cell in cells:
        if cell["method"] == method:
            losses = [r["choice"][0] if which == "choice" else r[which] for r in records if is_of(r, cell)]
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


def pending(
    design: dict[str, Any], records: list[dict[str, Any]], blocks: list[str], without: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the cells that were not run, with the names of their blocks, in the order of the design."""
    for block in chosen_blocks(design, blocks):
        for cell in cells_of(design, block, records, without):
            if not any(is_of(record, cell) for record in records):
                yield block["name"], cell
