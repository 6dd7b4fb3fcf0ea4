"""Tables of LoRA-DA against plain LoRA on a metric: where a head is new, and at the settings that people use.

    for task in sections roles sizes; do
        python benchmarks/compare_inits.py --design benchmarks/designs/no_harm.json --task $task \
            --output benchmarks/results/no_harm_$task.jsonl
    done
    python benchmarks/no_harm.py benchmarks/results/no_harm_*.jsonl

writes `no_harm.md` beside the lines. With the designs `usual_settings`, `usual_gsm8k` and `usual_packages`,

    python benchmarks/no_harm.py --usual benchmarks/results/usual_*.jsonl

writes `usual.md` and `usual.png`, the metric over the learning rate, and of the design `around_usual`, run into
`around_*.jsonl`, `around.md` and so on. With the design `lasting` and `--lasting`, the tries at a lead that lasts are
put beside each other in `lasting.md`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lines import read_lines
from report import (
    TRIED,
    at_best_rate,
    by_rate,
    course,
    course_table,
    describe,
    draw,
    grouped,
    markdown,
    middle,
    rate_text,
)

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
    "lora_da_fa": "LoRA-DA, A frozen",
    "lora_on_da": "LoRA-DA's step in the base, plain LoRA on top",
}


def scores(records: Sequence[Record], place: int = -1) -> dict[int, float]:
    """Return the score at the end, or at another evaluation, by seed; that of a run that diverged is zero."""
    ended = {record["cell"]["seed"]: record["scores"][-1][0] == record["cell"]["steps"] for record in records}
    return {r["cell"]["seed"]: r["scores"][place][1] * (ended[r["cell"]["seed"]] or place == 0) for r in records}


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Return mean, standard deviation and number of scores in percent; of losses, as they are, with four digits."""
    found = [value * (1 if digits == 4 else 100) for value in values]
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.{digits}f}{spread} ({len(found)})" if found else "none"


def difference(ours: dict[int, float], theirs: dict[int, float], digits: int = 1) -> tuple[str, str]:
    """Return the mean difference on the seeds of both, in points, with its 95 % interval; and the worst seed's.

    With four digits it is one of losses, not of scores.
    """
    scale = 1 if digits == 4 else 100
    found = [scale * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if len(found) < 2:
        return "one seed" if found else "none", f"{min(found):+.{digits}f}" if found else "none"
    half = T_95[len(found) - 1] * statistics.stdev(found) / len(found) ** 0.5
    return f"{statistics.fmean(found):+.{digits}f} ± {half:.{digits}f}", f"{min(found):+.{digits}f}"


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


# ---- at the settings that people use

USUAL_RATES = (1e-4, 2e-4, 5e-4)
PAIR = ("lora_da", "lora")
OTHERS = {
    "longer": "{steps} steps of plain LoRA",
    "drawn head": "drawn head of plain LoRA",
    "pissa": "PiSSA in place of plain LoRA",
}
"""What LoRA-DA is compared with as well, and what its row says."""
TEXTS = {"smollm2-135m-instruct": "SmolLM2-135M, GSM8K", "gemma-3-270m": "Gemma 3 270M, packages"}
COURSE = "LoRA-DA's training loss less plain LoRA's, same batches, 2e-4, mean ± standard error over batches, by step:"


def panels(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Return the runs of each subject and rank by name, with the loss by which a rate is chosen.

    That is the one on other rows or, of text, the training loss of the last 128 steps of an epoch.
    """
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["cell"]["rank"]):
        task = record["subject"].get("task")
        model = record["subject"].get("model")
        name = f"MiniLM, {task}" if task else TEXTS.get(model, model)
        chosen = record["choice"][0] if task else record["final_loss"]
        if not task and chosen is not None:
            chosen = statistics.fmean(record["train_losses"][-128:])
        rank, warmup, rslora = (record["cell"][one] for one in ("rank", "warmup", "use_rslora"))
        name += f", rank {rank}" + ", rsLoRA" * rslora + f", {warmup:.0%} of warm-up" * (warmup != 0.03)
        found.setdefault(name, []).append({**record, "chosen": chosen})
    return list(found.items())


def measured(records: Sequence[Record]) -> dict[int, float]:
    """Return the score of a task, or the loss of text, by seed; of text that diverged none."""
    if "scores" in records[0]:
        return scores(records)
    return {r["cell"]["seed"]: r["final_loss"] for r in records if r["final_loss"] is not None}


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group the runs that have the usual number of steps, with plain LoRA under the head that LoRA-DA fits as lora."""
    steps = min(record["cell"]["steps"] for record in records)
    found = {name: runs for (name,), runs in grouped(records, "method").items()}
    usual = {name: [run for run in runs if run["cell"]["steps"] == steps] for name, runs in found.items()}
    if "task" in records[0]["subject"]:
        usual["drawn head"], usual["lora"] = usual.get("lora", []), usual.get("lora_beside_da", [])
    plain = found.get("lora_beside_da", found.get("lora", []))
    return {**usual, "longer": [run for run in plain if run["cell"]["steps"] > steps]}


def usual_table(records: Sequence[Record]) -> list[str]:
    """Compare LoRA-DA with plain LoRA at the usual rates, at equal cost, and each at its best rate."""
    rows: list[list[str]] = []
    for name, found in panels(records):
        runs = by_method(found)
        ours, plain = by_rate(runs.get("lora_da", [])), by_rate(runs.get("lora", []))
        pairs = [(f"{rate:g}", ours[rate], plain[rate]) for rate in ours if rate in USUAL_RATES and rate in plain]
        for other, said in OTHERS.items():
            for rate, theirs in by_rate(runs.get(other, [])).items():
                text = said.format(steps=theirs[0]["cell"]["steps"])
                pairs += [(f"{rate:g}, {text}", ours[rate], theirs)] if rate in ours else []
        if len(ours) > 1 and len(plain) > 1:
            both = [runs["lora_da"], runs["lora"]]
            best = [at_best_rate(one, "chosen")[1] for one in both]
            pairs.append((f"best: {', '.join(rate_text(one, 'chosen') for one in both)}", best[0], best[1]))
        for rate, us, them in pairs:
            digits = 2 if "scores" in us[0] else 4
            columns = [percent(list(measured(one).values()), digits) for one in (them, us)]
            kept = [[run["forgetting"] for run in one if "forgetting" in run] for one in (them, us)]
            lost = ", ".join(f"{statistics.fmean(end - begin for begin, end in one):+.4f}" for one in kept if one)
            rows.append([name, rate, *columns, difference(measured(us), measured(them), digits)[0], lost, cost(us)])
    names = ["subject", "rate", "plain LoRA", "LoRA-DA", "LoRA-DA less plain LoRA", "forgetting of both"]
    return markdown([*names, "steps: start, head"], rows)


def usual_courses(records: Sequence[Record]) -> dict[str, dict[int, list[float]]]:
    """Return how the training losses of LoRA-DA differ from plain LoRA's on the way, at the rate of most recipes."""
    pairs = {name: [by_rate(by_method(found).get(method, [])) for method in PAIR] for name, found in panels(records)}
    return {name: course(*(runs.get(2e-4, []) for runs in pair)) for name, pair in pairs.items()}


def plot_courses(courses: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Draw what a course table has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, found in courses.items():
        middles = [1.5 * 2 ** (part - 1) for part in found]
        errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0 for values in found.values()]
        axes.errorbar(middles, list(map(statistics.fmean, found.values())), errors, capsize=3, marker="o", label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="step of an epoch at 2e-4", ylabel="training loss,\nLoRA-DA less plain LoRA")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def cost(records: Sequence[Record]) -> str:
    """Return how many steps the initialisation took, and what of them fitted the head, which plain LoRA may have."""
    made = [r for r in records if not r["initialization"]["reused"]]
    spent = [r["initialization"]["seconds"] + r.get("anew_seconds", 0) for r in made]
    heads = [r["notes"]["stages"].get("heads", 0) for r in made]
    took = [(*both, r["seconds_per_step"]) for *both, r in zip(spent, heads, made, strict=True)]
    return ", ".join(middle([one[place] / one[2] for one in took], ".0f") for place in (0, 1) if took)


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the metric over the learning rate: a panel for each subject and rank that has several, a line a method."""
    from matplotlib.figure import Figure

    found = [panel for panel in panels(records) if len(by_rate(panel[1])) > 1]
    figure = Figure(figsize=(4.5 * len(found), 4), layout="constrained")
    for axes, (name, cells) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        runs = by_method(cells)
        for method, said, color in (("lora", "plain LoRA", "C0"), ("lora_da", "LoRA-DA", "C1")):
            points = {rate: list(measured(one).values()) for rate, one in by_rate(runs.get(method, [])).items()}
            draw(axes, points, label=said, color=color, marker="o")
        axes.set(xscale="log", xlabel="learning rate", ylabel=cells[0].get("metric", "loss on unseen data"), title=name)
        axes.minorticks_off()
        axes.set_xticks(list(by_rate(cells)), [f"{rate:g}" for rate in by_rate(cells)])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---- tries at a lead that lasts


def lasting_table(records: Sequence[Record]) -> list[str]:
    """Compare each try, at the best rate of its own on the samples to choose by, with plain LoRA with a fitted head."""
    tries: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        tries.setdefault((cell["method"], cell["rank"], *map(cell.get, TRIED)), []).append(
            {**record, "chosen": record["choice"][0]}
        )
    rows: list[list[str]] = []
    plain = scores(at_best_rate(tries["lora_beside_da", 16, None, None], "chosen")[1])
    for (method, rank, *tried), runs in tries.items():
        names = [
            f", {name} {value:g}" for name, value in zip(("B's rate times", "anew after"), tried, strict=True) if value
        ]
        rates, ours = sorted(by_rate(runs)), at_best_rate(runs, "chosen")[1]
        found = [NAMES[method] + "".join(names), str(rank), ", ".join(f"{rate:g}" for rate in rates)]
        found += [rate_text(runs, "chosen"), percent(list(scores(ours).values()), 2)]
        rows.append([*found, difference(scores(ours), plain, 2)[0], cost(ours)])
    names = ["start", "rank", "rates", "best", "accuracy in percent", "less plain LoRA, head fitted"]
    return markdown([*names, "steps: start, head"], rows)


def main(paths: list[str]) -> None:
    """Write the tables of some files of results beside the first."""
    by_task = [read_lines(Path(path)) for path in paths if not path.startswith("--")]
    every = [record for records in by_task for record in records]
    if "--lasting" in paths:
        text = ["# Tries at a lead that lasts", "", describe(every[0]["subject"], [r["machine"] for r in every]), ""]
        Path(paths[-1]).with_name("lasting.md").write_text(
            "\n".join([*text, *lasting_table(every), ""]), encoding="utf-8"
        )
        return
    if "--usual" in paths:
        named = Path(paths[-1]).with_name(Path(paths[-1]).stem.split("_")[0])
        plot(every, named.with_suffix(".png"))
        plot_courses(courses := usual_courses(every), Path(f"{named}_course.png"))
        text = ["# At the settings that people use", "", *usual_table(every), "", f"![By rate]({named.name}.png)", ""]
        text += [COURSE, "", *course_table(courses), "", f"![By step]({named.name}_course.png)", ""]
        named.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
        return
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
