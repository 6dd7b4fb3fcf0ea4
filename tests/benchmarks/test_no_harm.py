"""The tasks with new heads, and the table that compares training on them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import no_harm
from lines import read_lines
from overview import RESULTS


def record(method, seed, score, *, task="sections", steps=600, ended=600):
    cell = {"method": method, "seed": seed, "learning_rate": 1e-3, "steps": steps, "rank": 16}
    scores = [[0, 0.1], [ended, score]]
    return {"block": "harm", "cell": cell, "subject": {"task": task}, "metric": "accuracy", "scores": scores}


def test_differences_are_paired_by_seed_and_a_run_that_diverged_has_nothing():
    plain = [record("lora", seed, score) for seed, score in enumerate((0.70, 0.72, 0.74))]
    ours = [record("lora_da", seed, score) for seed, score in enumerate((0.71, 0.75))]
    row = no_harm.harm_table([*plain, *ours])[2]
    assert "| 72.0 ± 2.0 (3) | none | 10.0 ± 0.0 (2) | 73.0 ± 2.8 (2) | +2.0 ± 12.7 | +1.0 | none |" in row
    diverged = record("lora_da", 2, 0.9, ended=300)
    assert "-74.0" in no_harm.harm_table([*plain, *ours, diverged])[2]


def usual_record(method, rate, seed, score, choice, *, steps=100, reused=False, warmup=0.03):
    made = record(method, seed, score, steps=steps, ended=steps)
    return made | {
        "cell": made["cell"] | {"learning_rate": rate, "warmup": warmup, "use_rslora": warmup > 0.03},
        "choice": [choice, 0.5],
        "initialization": {"seconds": 30.0, "reused": reused},
        "notes": {"stages": {"heads": 10.0}},
        "seconds_per_step": 0.5,
    }


def test_usual_settings_are_compared_at_the_same_rate_at_equal_cost_and_at_rates_chosen_on_other_rows():
    records = []
    for seed, (plain, ours) in enumerate(((0.70, 0.71), (0.72, 0.75))):
        records += [
            usual_record("lora_da", 2e-4, seed, ours, 1.0),
            usual_record("lora_beside_da", 2e-4, seed, plain, 1.0, reused=True),
            usual_record("lora_beside_da", 2e-4, seed, plain + 0.01, 1.0, steps=140),
            usual_record("lora", 2e-4, seed, plain - 0.2, 2.0),
            usual_record("lora_da", 1e-3, seed, 0.6, 0.9, reused=True),  # worse on the test rows, better on the others
            usual_record("lora_beside_da", 1e-3, seed, 0.8, 1.1, reused=True),
            usual_record("pissa", 2e-4, seed, plain, 2.0),
            usual_record("lora_da", 2e-4, seed, ours, 1.0, reused=True, warmup=0.1),
            usual_record("lora_beside_da", 2e-4, seed, plain, 1.0, reused=True, warmup=0.1),
        ]
    name, cost = "| MiniLM, sections, rank 16", "|  | 60, 20 |"
    assert no_harm.usual_table(records)[2:] == [
        f"{name} | 0.0002 | 71.00 ± 1.41 (2) | 73.00 ± 2.83 (2) | +2.00 ± 12.71 {cost}",
        f"{name} | 0.0002, 140 steps of plain LoRA | 72.00 ± 1.41 (2) | 73.00 ± 2.83 (2) | +1.00 ± 12.71 {cost}",
        f"{name} | 0.0002, drawn head of plain LoRA | 51.00 ± 1.41 (2) | 73.00 ± 2.83 (2) | +22.00 ± 12.71 {cost}",
        f"{name} | 0.0002, PiSSA in place of plain LoRA | 71.00 ± 1.41 (2) | 73.00 ± 2.83 (2) | +2.00 ± 12.71 {cost}",
        f"{name} | best: 0.001 (edge), 0.0002 (edge) | 71.00 ± 1.41 (2) | 60.00 ± 0.00 (2) | -11.00 ± 12.71 |  |  |",
        f"{name}, rsLoRA, 10% of warm-up | 0.0002 | 71.00 ± 1.41 (2) | 73.00 ± 2.83 (2) | +2.00 ± 12.71 |  |  |",
    ]


def test_of_text_losses_are_compared_and_what_was_forgotten():
    text = {"subject": {"model": "tiny"}, "forgetting": [2.0, 2.5], "notes": {"stages": {}}}
    records = []
    for method, ends in (("lora_da", (0.8, 0.9)), ("lora", (0.9, 1.1))):
        for seed, end in enumerate(ends):
            for rate, less, trained in ((2e-4, 0, 1.0), (1e-3, 0.5, 1.1)):  # the best rate is that of the training loss
                one = {**usual_record(method, rate, seed, 0, 0), **text, "final_loss": end - less}
                one["train_losses"] = [9.0, *[trained] * 128]
                records.append({name: one[name] for name in one if name not in ("scores", "choice", "metric")})
    for row in no_harm.usual_table(records)[2:]:
        assert "| 1.0000 ± 0.1414 (2) | 0.8500 ± 0.0707 (2) | -0.1500 ± 0.6355 | +0.5000, +0.5000 | 60, 0 |" in row
    assert "| best: 0.0002 (edge), 0.0002 (edge) |" in row


TABLES = {"no_harm": no_harm.harm_table, "lasting": no_harm.lasting_table}
TABLES |= {"usual": no_harm.usual_table, "around": no_harm.usual_table}


@pytest.mark.parametrize("kind", TABLES)
def test_the_documented_table_is_what_the_lines_say(kind):
    records = [one for path in sorted(RESULTS.glob(f"{kind}*.jsonl")) for one in read_lines(path)]
    for text in (Path(__file__).parents[2] / "docs" / "results.md", RESULTS / f"{kind}.md"):
        assert "\n".join(TABLES[kind](records)) in text.read_text(encoding="utf-8"), f"run no_harm.py: {text} is old"
