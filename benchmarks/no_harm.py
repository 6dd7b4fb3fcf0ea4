"""Tables of harm: does training from LoRA-DA's start end worse than from plain LoRA's where a head is new?

    for task in sections roles sizes; do
        python benchmarks/compare_inits.py --design benchmarks/designs/no_harm.json --task $task \
            --output benchmarks/results/no_harm_$task.jsonl
    done
    python benchmarks/no_harm.py benchmarks/results/no_harm_*.jsonl

writes `no_harm.md` beside the lines.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lines import read_lines
from report import describe, grouped, markdown

METRICS = {"accuracy": "accuracy in percent", "r2": "100 R²"}
EXPLAINED = (
    "Scores are those of test samples that nothing else reads, mean ± standard deviation (seeds). Differences are in "
    "points, paired by seed, with their 95 % interval."
)
FULL_LENGTH = ("harm", "more_seeds", "heads")
"""The blocks that train to the end."""
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
"""Student's quantile by degrees of freedom."""

Record = dict[str, Any]
NAMES = {
    "lora": "plain LoRA",
    "lora_beside_da": "plain LoRA, head fitted",
    "lora_da": "LoRA-DA",
    "lora_on_da": "LoRA-DA's step in the base, plain LoRA on top",
}


def scores(records: Sequence[Record], place: int = -1) -> dict[int, float]:
    """Return the score at the end, or at another evaluation, by seed; that of a run that diverged is zero."""
    ended = {record["cell"]["seed"]: record["scores"][-1][0] == record["cell"]["steps"] for record in records}
    return {r["cell"]["seed"]: r["scores"][place][1] * (ended[r["cell"]["seed"]] or place == 0) for r in records}


def percent(values: Sequence[float]) -> str:
    """Return a mean and a standard deviation in percent."""
    if not values:
        return "none"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} ({len(values)})"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[str, str]:
    """Return the mean difference on the seeds of both, in points, with its 95 % interval; and the worst seed's."""
    found = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if len(found) < 2:
        return "one seed" if found else "none", f"{min(found):+.1f}" if found else "none"
    half = T_95[len(found) - 1] * statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.fmean(found):+.1f} ± {half:.1f}", f"{min(found):+.1f}"


def harm_table(records: Sequence[Record]) -> list[str]:
    """Compare the default with plain LoRA, for each task and rate."""
    rows: list[list[str]] = []
    whole = [record for record in records if record["block"] in FULL_LENGTH]
    for task in dict.fromkeys(record["subject"]["task"] for record in whole):
        of_task = [record for record in whole if record["subject"]["task"] == task]
        named = f"{task}, {METRICS[of_task[0]['metric']]}"
        for (rate,), cells in sorted(grouped(of_task, "learning_rate").items(), reverse=True):
            by_method = {method: scores(found) for (method,), found in grouped(cells, "method").items()}
            first = scores([record for record in cells if record["cell"]["method"] == "lora_da"], 0)
            ours, plain, fitted = (by_method.get(method, {}) for method in ("lora_da", "lora", "lora_beside_da"))
            columns = [percent(list(values.values())) for values in (plain, fitted, first, ours)]
            rows.append([named, f"{rate:g}", *columns, *difference(ours, plain), difference(ours, fitted)[0]])
    names = ["task", "rate", "plain LoRA", "plain LoRA, head fitted", "LoRA-DA at step 0", "LoRA-DA"]
    return markdown([*names, "LoRA-DA less plain LoRA", "worst seed", "less plain LoRA, head fitted"], rows)


def parts_table(records: Sequence[Record]) -> list[str]:
    """List each method and set of settings at the rate of the parts."""
    rows: list[list[str]] = []
    short = [record for record in records if record["block"] not in FULL_LENGTH]
    for (steps, rank, *more, method), cells in grouped(short, "steps", "rank", "num_samples", "method").items():
        sets: dict[str, list[Record]] = {}
        for record in cells:
            sets.setdefault(json.dumps(record["cell"]["settings"]), []).append(record)
        for settings, found in sets.items():
            taken = [r["notes"]["step_size"] for r in found if r["notes"].get("step_size") is not None]
            length = f"{statistics.fmean(taken):.3g}" if taken and method == "lora_da" else ""
            named = NAMES[method] + (f", {settings.strip('{}')}" if settings != "{}" else "")
            both = [percent(list(scores(found, place).values())) for place in (0, -1)]
            rows.append([named, str(steps), str(rank), *map(str, more), length, *both])
    return markdown(["start", "steps", "rank", "samples", "step", "at step 0", "at the end"], rows)


def main(paths: list[str]) -> None:
    """Write the tables of some files of results beside the first."""
    by_task = [read_lines(Path(path)) for path in paths]
    every = [record for records in by_task for record in records]
    cell = every[0]["cell"]
    lines = ["# New heads: does the start do harm?", ""]
    lines += [f"Rank {cell['rank']}, {cell['steps']} steps. {EXPLAINED}", "", *harm_table(every), ""]
    for records in by_task:
        lines += [f"## {records[0]['subject']['task']}", ""]
        lines += [describe(records[0]["subject"], [record["machine"] for record in records]), ""]
        parts = [record for record in records if record["block"] not in FULL_LENGTH]
        if parts:
            cell = parts[0]["cell"]
            lines += [f"What helps, at {cell['learning_rate']:g}.", "", *parts_table(records), ""]
    Path(paths[0]).with_name("no_harm.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
