"""The tasks with new heads, and the table that compares training on them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import no_harm
import tasks
from lines import read_lines
from overview import RESULTS


def record(method, seed, score, *, task="sections", steps=600, ended=600):
    cell = {"method": method, "seed": seed, "learning_rate": 1e-3, "steps": steps}
    scores = [[0, 0.1], [ended, score]]
    return {"block": "harm", "cell": cell, "subject": {"task": task}, "metric": "accuracy", "scores": scores}


def test_differences_are_paired_by_seed_and_a_run_that_diverged_has_nothing():
    plain = [record("lora", seed, score) for seed, score in enumerate((0.70, 0.72, 0.74))]
    ours = [record("lora_da", seed, score) for seed, score in enumerate((0.71, 0.75))]
    row = no_harm.harm_table([*plain, *ours])[2]
    assert "| 72.0 ± 2.0 (3) | none | 10.0 ± 0.0 (2) | 73.0 ± 2.8 (2) | +2.0 ± 12.7 | +1.0 | none |" in row
    diverged = record("lora_da", 2, 0.9, ended=300)
    assert "-74.0" in no_harm.harm_table([*plain, *ours, diverged])[2]


def test_the_documented_table_of_harm_is_what_the_lines_say():
    records = [one for path in sorted(RESULTS.glob("no_harm_*.jsonl")) for one in read_lines(path)]
    table = "\n".join(no_harm.harm_table(records))
    for text in (Path(__file__).parents[2] / "docs" / "results.md", RESULTS / "no_harm.md"):
        assert table in text.read_text(encoding="utf-8"), f"run benchmarks/no_harm.py and copy its table to {text}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "self.size = count(names, key=order)",
            "self:read size:attribute count:called names:read key:argument order:read",
        ),
        ("return parts.append(one)", "parts:read append:called attribute one:read"),
    ],
)
def test_each_name_of_a_statement_has_its_role(line, expected):
    words, labels = tasks._roles_of(line)
    found = [f"{word}:{tasks.ROLES[label]}" for word, label in zip(words, labels, strict=True) if label >= 0]
    assert " ".join(found) == expected
