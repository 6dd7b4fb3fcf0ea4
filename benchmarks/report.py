"""Tables and plots of what `compare_inits.py` wrote.

    python benchmarks/report.py benchmarks/results/gsm8k.jsonl

For each rank, number of steps and number of training samples: every method at the learning rate of its lowest mean
final loss, with mean, standard deviation and number of seeds; the other learning rates; and what the initialisation
cost. The tables go to a .md file beside the lines, the plots to .png files.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

BAND = 1.02
"""Learning rates whose final loss is within 2 % of the method's best belong to its band."""

GROUP = ("rank", "steps", "num_train")
"""Settings of a cell that make a table of their own; and so do model and data."""


def spread(values: Sequence[float | None]) -> str:
    """Return mean, standard deviation and number of runs; runs that diverged are counted apart."""
    finite = [value for value in values if value is not None]
    if not finite:
        return f"diverged ({len(values)})"
    deviation = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    lost = f", {len(values) - len(finite)} diverged" if len(finite) < len(values) else ""
    return f"{statistics.fmean(finite):.4f}{deviation} ({len(finite)}{lost})"


def mean_loss(records: Sequence[Record], which: str = "final_loss") -> float:
    """Return the mean of a loss over runs: infinity if one of them diverged."""
    return statistics.fmean(math.inf if record[which] is None else record[which] for record in records)


def grouped(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Group records by settings of their cells, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["cell"][name] for name in names), []).append(record)
    return groups


def variants(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by method, and by what differs from the defaults in its settings."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        settings = record["cell"]["settings"]
        shown = f" {json.dumps(settings)}" if settings else ""
        groups.setdefault(record["cell"]["method"] + shown, []).append(record)
    return groups


def at_best_rate(records: Sequence[Record], which: str = "final_loss") -> tuple[float, list[Record]]:
    """Return the learning rate with the lowest mean loss, and its runs."""
    by_rate = {rate: found for (rate,), found in grouped(records, "learning_rate").items()}
    best = min(by_rate, key=lambda rate: mean_loss(by_rate[rate], which))
    return best, by_rate[best]


def band(records: Sequence[Record]) -> float:
    """Return the ratio of the largest to the smallest learning rate within 2 % of the best, neighbours only."""
    by_rate = {rate: mean_loss(found) for (rate,), found in grouped(records, "learning_rate").items()}
    rates = sorted(by_rate)
    best = min(by_rate.values())
    place = next(place for place, rate in enumerate(rates) if by_rate[rate] == best)
    low = high = place
    while low > 0 and by_rate[rates[low - 1]] <= BAND * best:
        low -= 1
    while high < len(rates) - 1 and by_rate[rates[high + 1]] <= BAND * best:
        high += 1
    return rates[high] / rates[low]


def first_step_at(record: Record, loss: float) -> int | None:
    """Return the first evaluated step at which a run has reached a loss."""
    return next((step for step, value in record["losses"] if value is not None and value <= loss), None)


def paired_difference(ours: Sequence[Record], theirs: Sequence[Record], which: str = "final_loss") -> str:
    """Return the mean difference of the losses on the same seeds, with its standard error."""
    by_seed = {record["cell"]["seed"]: record[which] for record in theirs}
    pairs = [(record[which], by_seed.get(record["cell"]["seed"])) for record in ours]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return ""
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{statistics.fmean(differences):+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def main_table(records: Sequence[Record]) -> list[str]:
    """Compare the methods, each at its best learning rate."""
    found = {name: at_best_rate(of_method) for name, of_method in variants(records).items()}
    plain = found.get("lora")
    target = mean_loss(plain[1]) if plain else math.nan
    lines = [
        "| method | best learning rate | loss at step 0 | final loss | less plain LoRA's, same seeds |"
        " lowest on the way | reaches plain LoRA's final loss at step | band | exact match |",
        "|---" * 9 + "|",
    ]
    for name, (rate, runs) in sorted(found.items(), key=lambda item: mean_loss(item[1][1])):
        starts, ends, lowest = ([value(r) for r in runs] for value in (first_loss, final_loss, best_loss))
        steps = [first_step_at(run, target) for run in runs]
        reached = [step for step in steps if step is not None]
        when = f"{statistics.median(reached):g} ({len(reached)} of {len(steps)})" if reached else "never"
        difference = paired_difference(runs, plain[1]) if plain and name != "lora" else ""
        lines.append(
            f"| {name} | {rate:g} | {spread(starts)} | {spread(ends)} | {difference} | {spread(lowest)} | "
            f"{when if plain else ''} | {band(variants(records)[name]):.3g} | {accuracy(runs)} |"
        )
    return lines


def lowest_table(records: Sequence[Record]) -> list[str]:
    """Compare the lowest losses on the way, each method at its best learning rate by them.

    That is what counts where few samples are seen several times, and training is stopped when the loss rises.
    """
    found = {name: at_best_rate(of_method, "best_loss") for name, of_method in variants(records).items()}
    lines = ["| method | best learning rate | lowest loss | less plain LoRA's, same seeds |", "|---" * 4 + "|"]
    for name, (rate, runs) in sorted(found.items(), key=lambda item: mean_loss(item[1][1], "best_loss")):
        plain = found["lora"][1] if "lora" in found and name != "lora" else []
        difference = paired_difference(runs, plain, "best_loss")
        lines.append(f"| {name} | {rate:g} | {spread([best_loss(run) for run in runs])} | {difference} |")
    return lines


def first_loss(record: Record) -> float | None:
    return record["losses"][0][1]


def final_loss(record: Record) -> float | None:
    return record["final_loss"]


def best_loss(record: Record) -> float | None:
    return record["best_loss"]


def accuracy(runs: Sequence[Record]) -> str:
    """Return the share of exact answers of all runs together, with Wilson's interval."""
    counted = [run["accuracy"] for run in runs if run["accuracy"]]
    if not counted:
        return ""
    if len(counted) == 1:
        (one,) = counted
        return f"{one['correct']}/{one['total']} ({one['low']:.1%} to {one['high']:.1%})"
    shares = [one["correct"] / one["total"] for one in counted]
    return f"{statistics.fmean(shares):.1%} ± {statistics.stdev(shares):.1%} ({len(shares)})"


def rates_table(records: Sequence[Record]) -> list[str]:
    """Show the final loss at every learning rate."""
    rates = sorted({record["cell"]["learning_rate"] for record in records})
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (1 + len(rates)) + "|"]
    for name, of_method in variants(records).items():
        by_rate = {rate: runs for (rate,), runs in grouped(of_method, "learning_rate").items()}
        cells = [spread([r["final_loss"] for r in by_rate[rate]]) if rate in by_rate else "" for rate in rates]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cost_table(records: Sequence[Record]) -> list[str]:
    """Show what initialisation and training took, as medians."""
    lines = [
        "| method | initialisation, s | its peak memory over the start, MiB | training, s a step | its peak, MiB |"
        " trained parameters | optimizer state, MiB |",
        "|---" * 7 + "|",
    ]
    for name, runs in variants(records).items():
        start, train = ([run[part] for run in runs] for part in ("initialization", "training"))
        columns = [
            f"{statistics.median(part['seconds'] for part in start):.1f}",
            f"{statistics.median(part['peak_mib'] - part['start_mib'] for part in start):.0f}",
            f"{statistics.median(run['seconds_per_step'] for run in runs):.2f}",
            f"{statistics.median(part['peak_mib'] for part in train):.0f}",
            f"{statistics.median(run['trainable'] for run in runs):.0f}",
            f"{statistics.median(run['optimizer_mib'] for run in runs):.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return lines


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw the final loss over the learning rate, and the loss over the steps at each method's best one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    rates_axes, steps_axes = figure.subplots(1, 2)
    for name, of_method in variants(records).items():
        by_rate = {rate: mean_loss(runs) for (rate,), runs in grouped(of_method, "learning_rate").items()}
        points = [(rate, loss) for rate, loss in sorted(by_rate.items()) if math.isfinite(loss)]
        if points:
            rates_axes.plot(*zip(*points, strict=True), marker="o", label=name)
        rate, runs = at_best_rate(of_method)
        curves = [dict(run["losses"]) for run in runs]
        steps = [step for step in curves[0] if all(curve.get(step) is not None for curve in curves)]
        means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        steps_axes.plot(steps, means, marker="o", label=f"{name}, {rate:g}")
    rates_axes.set(xscale="log", xlabel="learning rate", ylabel="final loss on unseen data", title=title)
    steps_axes.set(xlabel="step", ylabel="loss on unseen data", title="each at its best learning rate")
    for axes in (rates_axes, steps_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def describe(facts: dict[str, Any], machines: Sequence[dict[str, Any]]) -> str:
    """Name model, data, machines and versions."""
    seen = {json.dumps({**one, "date": ""}, sort_keys=True): one for one in machines}
    dates = sorted({one["date"] for one in machines})
    parts = [f"{name} {value}" for name, value in facts.items()]
    where = ["; ".join(f"{n} {v}" for n, v in one.items() if n != "date") for one in seen.values()]
    return f"{', '.join(parts)}. {dates[0]} to {dates[-1]}; " + " / ".join(where) + "."


def report(records: Sequence[Record], path: Path) -> str:
    """Return all tables, and save a plot for each group beside ``path``."""
    lines: list[str] = []
    subjects = {json.dumps(record["subject"], sort_keys=True): record["subject"] for record in records}
    plots = 0
    for key, facts in subjects.items():
        of_subject = [record for record in records if json.dumps(record["subject"], sort_keys=True) == key]
        lines += [f"## {facts['model']}", "", describe(facts, [record["machine"] for record in of_subject]), ""]
        for values, found in grouped(of_subject, *GROUP).items():
            rank, steps, num_train = values
            title = f"rank {rank}, {steps} steps, {num_train or facts['train']} training samples"
            plots += 1
            picture = path.with_name(f"{path.stem}_{plots}.png")
            plot(found, title, picture)
            lines += [f"### {title[0].upper()}{title[1:]}", "", "Mean ± standard deviation (runs).", ""]
            if num_train is not None:
                lines += ["Lowest loss on the way:", "", *lowest_table(found), "", "At the end:", ""]
            lines += [*main_table(found), "", "Final loss by learning rate:", "", *rates_table(found), ""]
            lines += [f"![{title}]({picture.name})", ""]
        lines += ["### What it took", "", *cost_table(of_subject), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="what compare_inits.py wrote")
    options = parser.parse_args(argv)
    records = [json.loads(line) for line in options.lines.read_text(encoding="utf-8").splitlines()]
    if not records:
        parser.error(f"{options.lines} holds no result yet")
    text = report(records, options.lines)
    options.lines.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
