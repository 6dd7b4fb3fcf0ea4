"""Tables and plots of what `compare_inits.py` wrote.

    python benchmarks/report.py outputs/gsm8k.jsonl

For each rank, number of steps and number of training samples: every method at the learning rate of its lowest mean
final loss, with mean, standard deviation and number of seeds; the other learning rates; and what it cost. A rate is
chosen on the seeds that all rates of the method were run with, and by the losses that are reported: the more rates a
method has, the more that flatters it. Of runs that differ only in where they were evaluated, the last counts. The
tables go to a .md file beside the lines, the plots to .png files.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lines import read_lines

Record = dict[str, Any]

GROUP = ("rank", "steps", "num_train")
"""Settings of a cell that make a table of their own; and so do model and data."""

MARKERS = "osD^v"  # one for each ten methods of a picture, which repeat the colours
PICTURED = 1.15
"""Final losses up to this many times the lowest are in the picture of learning rates, and each method's best."""

ALONG = "Training batches, less plain LoRA's loss of the same ones, mean ± standard error over batches, by step:"

EXPLAINED = (
    "Mean ± standard deviation (runs). Differences: mean ± standard error (seeds that both have); with three seeds "
    "95 % of the t-distribution lie within 4.3 standard errors, and 82 % within two."
)

LOOKS = ("evaluations", "accuracy_samples", "max_new_tokens", "answer_pattern")
"""Settings of a cell, those of older ones among them, that say where it is looked at, and change nothing of it."""

TRIED = ("lora_plus", "anew_after")
"""Settings of a cell that are in a row's name where they are given."""

EQUAL = ("batch_size", "alpha", "use_rslora", "num_samples", "warmup", "max_grad_norm")
"""Settings that runs are to share if they are compared: what is not as in most runs of a table is in a row's name."""


def markdown(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a table in Markdown; no lines if it has no rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]] if rows else []


def spread(values: Sequence[float | None]) -> str:
    """Return mean, standard deviation and number of runs; runs that diverged are counted apart."""
    finite = [value for value in values if value is not None]
    if not finite:
        return f"diverged ({len(values)})"
    deviation = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    lost = f", {len(values) - len(finite)} diverged" if len(finite) < len(values) else ""
    return f"{statistics.fmean(finite):.4f}{deviation} ({len(finite)}{lost})"


def mean_loss(records: Sequence[Record], which: str = "final_loss") -> float:
    """Return the mean of a loss over runs, `first_loss` being that at step 0: infinity if one of them diverged."""
    losses = losses_of(records, which)
    return statistics.fmean(math.inf if loss is None else loss for loss in losses)


def losses_of(records: Sequence[Record], which: str) -> list[float | None]:
    """Return a loss of each run; that at step 0 is called `first_loss`."""
    return [record["losses"][0][1] if which == "first_loss" else record[which] for record in records]


def grouped(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Group records by settings of their cells, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["cell"][name] for name in names), []).append(record)
    return groups


def each_once(records: Sequence[Record]) -> list[Record]:
    """Return the last of the records that differ only in where a run was looked at."""
    last: dict[str, Record] = {}
    for record in records:
        what = {name: value for name, value in record["cell"].items() if name not in LOOKS}
        last[json.dumps(what, sort_keys=True)] = record
    return list(last.values())


def variants(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by method, and by what differs in its settings from the defaults, or from most of the records."""
    usual = {name: Counter(record["cell"][name] for record in records).most_common(1)[0][0] for name in EQUAL}
    groups: dict[str, list[Record]] = {}
    for record in records:
        cell = record["cell"]
        settings = f" {json.dumps(cell['settings'])}" if cell["settings"] else ""
        others = "".join(f" {name}={cell[name]}" for name in EQUAL if cell[name] != usual[name])
        others += "".join(f" {name}={cell[name]}" for name in TRIED if cell.get(name))
        read = " reads=first" if cell.get("reads") == "first" else ""
        groups.setdefault(cell["method"] + settings + others + read, []).append(record)
    return groups


def partner_of(name: str) -> str:
    """Return the row that a row is compared with: plain LoRA, with A frozen where it is."""
    method, _, others = name.partition(" ")
    equal = "".join(f" {part}" for part in others.split() if part.partition("=")[0] in EQUAL)
    return ("lora_fa" if method.endswith("_fa") else "lora") + equal


def by_rate(records: Sequence[Record]) -> dict[float, list[Record]]:
    """Group records by learning rate, from small to large."""
    return dict(sorted((rate, found) for (rate,), found in grouped(records, "learning_rate").items()))


def on_shared_seeds(records: Sequence[Record]) -> dict[float, list[Record]]:
    """Group records by learning rate, those of the seeds that all rates were run with.

    Rates that have no seed in common with the one with most of them are left out.
    """
    rates = by_rate(records)
    seeds = {rate: {record["cell"]["seed"] for record in found} for rate, found in rates.items()}
    most = max(seeds.values(), key=len)
    rates = {rate: found for rate, found in rates.items() if seeds[rate] & most}
    common = set.intersection(most, *(seeds[rate] for rate in rates)) or most
    chosen = {rate: [record for record in found if record["cell"]["seed"] in common] for rate, found in rates.items()}
    return {rate: found for rate, found in chosen.items() if found}


def rate_losses(records: Sequence[Record], which: str = "final_loss") -> dict[float, float]:
    """Return the mean loss of every learning rate, over the seeds that all of them were run with."""
    return {rate: mean_loss(found, which) for rate, found in on_shared_seeds(records).items()}


def at_best_rate(records: Sequence[Record], which: str = "final_loss") -> tuple[float, list[Record]]:
    """Return the learning rate with the lowest mean loss on the seeds that all rates share, and all of its runs."""
    losses = rate_losses(records, which)
    best = min(losses, key=losses.__getitem__)
    return best, by_rate(records)[best]


def rate_text(records: Sequence[Record], which: str = "final_loss") -> str:
    """Write the best learning rate, and whether it is the smallest or the largest of those that were tried."""
    rates, (best, _) = list(rate_losses(records, which)), at_best_rate(records, which)
    is_edge = best in (rates[0], rates[-1])
    return f"{best:g}" + (" (alone)" if len(rates) == 1 else " (edge)" if is_edge else "")


def paired_difference(ours: Sequence[Record], theirs: Sequence[Record], which: str = "final_loss") -> str:
    """Return the mean difference of the losses on the same seeds, with its standard error and the number of seeds.

    Seeds where one of the two diverged are left out, and counted.
    """
    by_seed = {record["cell"]["seed"]: record[which] for record in theirs}
    pairs = [(record[which], by_seed[seed]) for record in ours if (seed := record["cell"]["seed"]) in by_seed]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return ""
    lost = f", {len(pairs) - len(differences)} diverged" if len(differences) < len(pairs) else ""
    return f"{mean_difference(differences)} ({len(differences)}{lost})"


def main_table(records: Sequence[Record]) -> list[str]:
    """Compare the methods, each at its best learning rate."""
    of_methods = variants(records)
    found = {name: at_best_rate(of_method)[1] for name, of_method in of_methods.items()}
    of_losses = ("loss at step 0", "final loss", "less plain LoRA's, same seeds", "lowest on the way")
    rows = []
    for name, runs in sorted(found.items(), key=lambda item: mean_loss(item[1])):
        plain = found.get(partner_of(name), [])
        starts, ends, lowest = (spread(losses_of(runs, which)) for which in ("first_loss", "final_loss", "best_loss"))
        difference = "" if name == partner_of(name) else paired_difference(runs, plain)
        rate = rate_text(of_methods[name])
        rows.append((name, rate, starts, ends, difference, lowest))
    return markdown(("method", "best learning rate", *of_losses), rows)


def start_table(records: Sequence[Record]) -> list[str]:
    """Compare what was not trained, by the loss at step 0."""
    of_methods = variants(records)
    rows = []
    for name, runs in sorted(of_methods.items(), key=lambda item: mean_loss(item[1])):
        as_default = re.sub(r" \{.*\}", "", name)
        default = [] if name == as_default else of_methods.get(as_default, [])
        seconds = [run["initialization"]["seconds"] for run in runs if not run["initialization"].get("reused")]
        loss, difference = spread(losses_of(runs, "final_loss")), paired_difference(runs, default)
        rows.append((name, loss, difference, middle(seconds, ".0f")))
    columns = ("start", "loss at step 0", "less that of the default settings, same seeds", "initialisation, s")
    return markdown(columns, rows)


def ranks_table(records: Sequence[Record]) -> list[str]:
    """Show what each method's final loss is less plain LoRA's, at every rank, each at its best rate there.

    Runs on a part of the training samples are left out.
    """
    rows = []
    for (steps, num_train), found in grouped(records, "steps", "num_train").items():
        by_rank = {rank: variants(of_rank) for (rank,), of_rank in sorted(grouped(found, "rank").items())}
        if not steps or num_train is not None:
            continue
        for name in dict.fromkeys(name for of_rank in by_rank.values() for name in of_rank):
            with_plain = {rank: both for rank, both in by_rank.items() if {name, partner_of(name)} <= set(both)}
            if name == partner_of(name) or len(with_plain) < 2:
                continue
            for rank, of_rank in with_plain.items():
                ours, plain = of_rank[name], of_rank[partner_of(name)]
                difference = paired_difference(at_best_rate(ours)[1], at_best_rate(plain)[1])
                rows.append((steps, name, rank, f"{rate_text(ours)}, {rate_text(plain)}", difference))
    return markdown(("steps", "method", "rank", "learning rates", "less plain LoRA's, same seeds"), rows)


def along_table(records: Sequence[Record]) -> list[str]:
    """Compare the losses of training batches with plain LoRA's, each method at its best rate."""
    found = {name: at_best_rate(runs)[1] for name, runs in variants(records).items()}
    others = {name: runs for name, runs in found.items() if name != partner_of(name)}
    return course_table({name: course(runs, found.get(partner_of(name), [])) for name, runs in others.items()})


def course(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[int, list[float]]:
    """Return by how much training losses differ on the same batches of the same seed: at k of steps 2^(k-1) to 2^k - 1.

    The loss of step n is the one before the weights change for the n-th time.
    """
    found: dict[int, list[float]] = {}
    for run, other in (
        (run, other) for run in ours for other in theirs if run["cell"]["seed"] == other["cell"]["seed"]
    ):
        for step, both in enumerate(zip(run.get("train_losses", ()), other.get("train_losses", ()), strict=False), 1):
            if None not in both:
                found.setdefault(step.bit_length(), []).append(both[0] - both[1])
    return found


def course_table(courses: dict[str, dict[int, list[float]]]) -> list[str]:
    """Write the mean of each part of the way, with its standard error over batches."""
    courses = {name: found for name, found in courses.items() if found}
    parts = sorted({part for found in courses.values() for part in found})
    rows = [(name, *(mean_difference(found.get(part, [])) for part in parts)) for name, found in courses.items()]
    return markdown(("", *(f"from {2 ** (part - 1)}" for part in parts)), rows)


def mean_difference(values: Sequence[float]) -> str:
    """Write the mean, with its standard error if there is one."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{error}" if values else ""


def rates_table(records: Sequence[Record]) -> list[str]:
    """Show the final loss at every learning rate."""
    rates = sorted({record["cell"]["learning_rate"] for record in records})
    rows = []
    for name, of_method in variants(records).items():
        found = by_rate(of_method)
        rows.append((name, *(spread(losses_of(found[rate], "final_loss")) if rate in found else "" for rate in rates)))
    return markdown(("method", *(f"{rate:g}" for rate in rates)), rows)


def cost_table(records: Sequence[Record]) -> list[str]:
    """Show what initialisation and training took, as medians.

    Starts that were made for an earlier cell or solved from its statistics are left out, and so is the memory of runs
    that did not have a process of their own.
    """
    of_ranks = {
        f"{name}, rank {rank}" + (f", {num_train} samples" if num_train else ""): runs
        for name, of_method in variants(records).items()
        for (rank, num_train), runs in grouped(of_method, "rank", "num_train").items()
    }
    rows = []
    for name, runs in of_ranks.items():
        made = [run for run in runs if not run["initialization"].get("reused")]
        trained = [run for run in runs if run["cell"]["steps"]]
        peaks = [run["initialization"] for run in made if run.get("isolated")]
        in_steps = [run["initialization"]["seconds"] / run["seconds_per_step"] for run in made if run["cell"]["steps"]]
        columns = {
            "initialisation, s": middle([run["initialization"]["seconds"] for run in made], ".1f"),
            "in training steps": middle(in_steps, ".1f"),
            "its peak memory over the start, MiB": middle([one["peak_mib"] - one["start_mib"] for one in peaks], ".0f"),
            "training, s a step": middle([run["seconds_per_step"] for run in trained], ".2f"),
            "its peak, MiB": middle([run["training"]["peak_mib"] for run in trained if run.get("isolated")], ".0f"),
            "trained parameters": middle([run["trainable"] for run in runs], ".0f"),
            "optimizer state, MiB": middle([run["optimizer_mib"] for run in trained], ".1f"),
        }
        rows.append((name, *columns.values()))
    return markdown(("method", *columns), rows)


def middle(values: Sequence[float], form: str) -> str:
    """Write the median, if there is one."""
    return format(statistics.median(values), form) if values else ""


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw final losses over the learning rate, and losses over the steps at each method's best one.

    Means, with the standard deviation where there are several runs; over the learning rate, of the seeds that all rates
    of a method have. Final losses far above the lowest lie outside. Losses over the steps are left out where no run has
    any between the first and the last.
    """
    from matplotlib.figure import Figure

    drawn_apart = [record for record in records if record["cell"].get("reads") != "first"]
    shown = variants(drawn_apart or records)  # starts from the samples that training begins with are left out
    has_curves = any(len(steps_of_all(at_best_rate(runs)[1])) > 2 for runs in shown.values())
    figure = Figure(figsize=(10 if has_curves else 6, 6), layout="constrained")
    rates_axes, *curve_axes = figure.subplots(1, 1 + has_curves, squeeze=False)[0]
    means = [rate_losses(runs).values() for runs in shown.values()]
    lowest = min(map(min, means))
    limit = max([PICTURED * lowest, *(best for best in map(min, means) if math.isfinite(best))])
    highest = max(mean for losses in means for mean in losses if mean <= limit)
    for number, (name, of_method) in enumerate(shown.items()):
        style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}
        rate, runs = at_best_rate(of_method)
        finals = {rate: losses_of(found, "final_loss") for rate, found in on_shared_seeds(of_method).items()}
        draw(rates_axes, finals, label=f"{name} (best: {rate:g})", **style)
        curves = [dict(run["losses"]) for run in runs]
        for axes in curve_axes:
            draw(axes, {step: [curve[step] for curve in curves] for step in steps_of_all(runs)}, **style)
    if math.isfinite(highest):
        room = 0.05 * (highest - lowest) or 0.01 * lowest
        rates_axes.set_ylim(lowest - 2 * room, highest + 2 * room)
    rates_axes.set(xscale="log", xlabel="learning rate", ylabel="final loss on unseen data", title=title)
    for axes in curve_axes:
        axes.set(xlabel="step", ylabel="loss on unseen data", title="each at its best learning rate")
    for axes in (rates_axes, *curve_axes):
        axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2 if has_curves else 1)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def steps_of_all(runs: Sequence[Record]) -> list[int]:
    """Return the steps at which all of some runs were evaluated."""
    return sorted(set.intersection(*({step for step, _ in run["losses"]} for run in runs)))


def draw(axes: Any, points: dict[Any, list[float | None]], **style: Any) -> None:
    """Draw means with their standard deviations; points of which a run diverged are left out."""
    found = {x: [y for y in ys if y is not None] for x, ys in points.items() if None not in ys}
    if found:
        deviations = [statistics.stdev(ys) if len(ys) > 1 else 0.0 for ys in found.values()]
        means = [statistics.fmean(ys) for ys in found.values()]
        axes.errorbar(list(found), means, yerr=deviations, capsize=3, **style)


def describe(facts: dict[str, Any], machines: Sequence[dict[str, Any]]) -> str:
    """Name model, data, machines and versions."""
    dates = sorted({one["date"] for one in machines})
    seen = dict.fromkeys("; ".join(f"{n} {v}" for n, v in one.items() if n != "date") for one in machines)
    return f"{', '.join(f'{n} {v}' for n, v in facts.items())}. {dates[0]} to {dates[-1]}; {' / '.join(seen)}."


def shared_settings(records: Sequence[Record]) -> str:
    """Name what all runs have in common, and by how many versions of the code they were made."""
    values = {name: sorted({json.dumps(record["cell"][name]) for record in records}) for name in EQUAL}
    codes = Counter(record["code"]["package_sha256"] if record.get("code") else "not recorded" for record in records)
    shared = ", ".join(f"{name} {' or '.join(found)}" for name, found in values.items())
    return f"{shared}; code {', '.join(f'{code} ({number} runs)' for code, number in codes.items())}."


def report(records: Sequence[Record], path: Path) -> str:
    """Return all tables, and save a plot for each group beside ``path``."""
    lines: list[str] = []
    subjects = {json.dumps(record["subject"], sort_keys=True): record["subject"] for record in records}
    plots = 0
    for key, facts in subjects.items():
        every_look = [one for one in records if json.dumps(one["subject"], sort_keys=True) == key]
        of_subject = each_once(every_look)
        lines += [f"## {facts['model']}", "", describe(facts, [record["machine"] for record in of_subject]), ""]
        lines += [shared_settings(of_subject), ""]
        for values, found in grouped(of_subject, *GROUP).items():
            rank, steps, num_train = values
            title = f"rank {rank}, {steps} steps, {num_train or facts['train']} training samples"
            lines += [f"### {title[0].upper()}{title[1:]}", "", EXPLAINED, ""]
            if steps == 0:
                lines += [*start_table(found), ""]
                continue
            plots += 1
            picture = path.with_name(f"{path.stem}_{plots}.png")
            plot(found, title, picture)
            lines += [*main_table(found), "", "Final loss by learning rate:", "", *rates_table(found), ""]
            along = along_table(found)
            lines += [ALONG, "", *along, ""] if along else []
            lines += [f"![{title}]({picture.name})", ""]
        ranks = ranks_table(of_subject)
        lines += ["### Ranks", "", *ranks, ""] if ranks else []
        for threads in sorted({record["machine"].get("threads", 0) for record in every_look}, reverse=True):
            alike = [record for record in every_look if record["machine"].get("threads", 0) == threads]
            where = f" with {threads} thread{'s' * (threads > 1)}" if threads else ""
            lines += [f"### What it took{where}", "", *cost_table(alike), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="what compare_inits.py wrote")
    options = parser.parse_args(argv)
    records = read_lines(options.lines)
    if not records:
        parser.error(f"{options.lines} {'holds no result yet' if options.lines.exists() else 'does not exist'}")
    text = report(records, options.lines)
    options.lines.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nThis, and its pictures: {options.lines.with_suffix('.md')}")


if __name__ == "__main__":
    main()
