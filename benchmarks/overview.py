"""LoRA-DA less plain LoRA, everywhere the two were compared: one table and one picture.

    python benchmarks/overview.py

It reads the lines of `compare_inits.py` that are committed in `benchmarks/results`, and writes `overview.md` and
`overview.png` beside them. A row is a data set, a rank, a number of steps and of training samples, with A trained or
frozen; both methods are at the learning rate of their lowest mean loss there. LoRA-DA has its default settings and
starts from samples drawn apart from the order of training; where there are few training samples, the start reads all of
them however it draws, and the loss is the lowest of the evaluations on the way.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lines import read_lines
from report import (
    EXPLAINED,
    GROUP,
    Record,
    at_best_rate,
    each_once,
    grouped,
    losses_of,
    markdown,
    mean_loss,
    paired_difference,
    rate_text,
    spread,
    variants,
)

RESULTS = Path(__file__).resolve().parent / "results"
DATA = {
    "gsm8k_first": "GSM8K",
    "stdlib_same_modules": "standard library, same modules",
    "stdlib_second": "standard library, same modules, float32",
    "stdlib_first": "standard library, other modules",
}
"""What the lines of each file were run on."""

CROSSES = " \N{DOUBLE DAGGER}"
"""Stands beside a difference of runs on unlike processors."""


@dataclass(frozen=True)
class Comparison:
    """What one row compares.

    Attributes:
        name: Data set, rank, steps and whatever else the row differs in.
        plain: Runs of plain LoRA at its best rate, and that rate.
        ours: The same of LoRA-DA.
        which: The loss that counts: ``final_loss``, or ``best_loss`` with few samples.
    """

    name: str
    plain: tuple[str, list[Record]]
    ours: tuple[str, list[Record]]
    which: str

    def differences(self) -> list[float]:
        """Return LoRA-DA's loss less plain LoRA's for each seed on which both ended."""
        by_seed = {run["cell"]["seed"]: run[self.which] for run in self.plain[1]}
        pairs = [(run[self.which], by_seed.get(run["cell"]["seed"])) for run in self.ours[1]]
        return [ours - plain for ours, plain in pairs if ours is not None and plain is not None]

    def crosses_processors(self) -> bool:
        """Tell whether some seed's two runs were on processors of unlike makers, which round bfloat16 otherwise."""
        processors = {run["cell"]["seed"]: run["machine"]["cpu"] for run in self.plain[1]}
        ours = {run["cell"]["seed"]: run["machine"]["cpu"] for run in self.ours[1]}
        return any(processors[seed] != ours[seed] for seed in processors.keys() & ours.keys())


def comparisons(records: list[Record], data: str) -> Iterator[Comparison]:
    """Yield the comparisons with plain LoRA among the runs on one data set, those with A trained first."""
    tables = grouped(records, *GROUP)
    for ours, plain in (("lora_da", "lora"), ("lora_da_fa", "lora_fa")):
        for rank, steps, num_train in sorted(tables, key=lambda key: (key[2] or 0, key[1], key[0])):
            rows = variants(tables[rank, steps, num_train])
            if num_train is not None:
                rows = {name.removesuffix(" reads=first"): runs for name, runs in rows.items()}
            if not steps or ours not in rows or plain not in rows:
                continue
            which = "final_loss" if num_train is None else "best_loss"
            at_best = [(rate_text(rows[name], which), at_best_rate(rows[name], which)[1]) for name in (plain, ours)]
            few = "" if num_train is None else f", {num_train} samples"
            frozen = ", A frozen" if plain == "lora_fa" else ""
            yield Comparison(f"{data}, rank {rank}, {steps} steps{few}{frozen}", *at_best, which)


def table(found: list[Comparison]) -> list[str]:
    """Return the rows of a table in Markdown."""
    rows = []
    for one in found:
        (plain_rate, plain), (our_rate, ours) = one.plain, one.ours
        differences = one.differences()
        mark = CROSSES if one.crosses_processors() else ""
        rows.append(
            (
                one.name,
                f"{mean_loss(plain, 'first_loss'):.4f}, {mean_loss(ours, 'first_loss'):.4f}",
                f"{spread(losses_of(plain, one.which))} at {plain_rate}",
                f"{spread(losses_of(ours, one.which))} at {our_rate}",
                f"{paired_difference(ours, plain, one.which)}{mark}",
                f"{sum(value < 0 for value in differences)} of {len(differences)}",
            )
        )
    columns = ("loss at step 0: base, LoRA-DA", "plain LoRA, and its rate", "LoRA-DA, and its rate")
    return markdown(("", *columns, "LoRA-DA less plain LoRA, same seeds", "lower on"), rows)


def plot(found: list[Comparison], path: Path) -> None:
    """Draw the differences: a dot for each seed, and the mean with its standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.34 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(found):
        values = one.differences()
        axes.plot(values, [place] * len(values), "o", color="tab:gray", alpha=0.5, markersize=4)
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
            axes.errorbar(
                statistics.fmean(values), place, xerr=error, marker="|", markersize=10, color="tab:blue", capsize=3
            )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [one.name for one in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("Loss on unseen data, LoRA-DA less plain LoRA, each at its best rate", fontsize=10, loc="left")
    axes.set_xlabel("LoRA-DA lower  \N{LEFTWARDS ARROW}     \N{RIGHTWARDS ARROW}  plain LoRA lower")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def read_comparisons() -> list[Comparison]:
    """Return the comparisons of all files, in the order of `DATA`."""
    found: list[Comparison] = []
    for stem, data in DATA.items():
        found += comparisons(each_once(read_lines(RESULTS / f"{stem}.jsonl")), data)
    return found


def summary(found: list[Comparison]) -> str:
    """Count the comparisons, and the seeds of all of them, in which LoRA-DA ended lower."""
    differences = [one.differences() for one in found]
    means = [statistics.fmean(values) for values in differences if values]
    seeds = [value for values in differences for value in values]
    lower = [sum(value < 0 for value in values) for values in (means, seeds)]
    return f"in {lower[0]} of {len(means)} comparisons, on {lower[1]} of {len(seeds)} seeds in all"


def main() -> None:
    """Run the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = read_comparisons()
    plot(found, RESULTS / "overview.png")
    rates = "Rates: `alone` is the only one that was run, `edge` the lowest or highest of those that were."
    unlike = f"{CROSSES.strip()}: the two methods ran on processors of unlike makers."
    about = f"LoRA-DA ends lower {summary(found)}. {EXPLAINED} {rates} {unlike}"
    text = "\n".join(["# LoRA-DA and plain LoRA", "", about, "", *table(found), "", "![The same](overview.png)"])
    (RESULTS / "overview.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
