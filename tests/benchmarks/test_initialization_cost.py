"""What an initialisation costs beside the peers: every row of the table."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from harness import make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import initialization_cost


@pytest.fixture
def argv(tmp_path):
    """The command line for a tiny model and its data."""
    make_tiny_llama(hidden_size=32, intermediate_size=48, num_attention_heads=2).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = [[f"w{3 + (i * 5 + 7 * k) % 20}" for k in range(24 + i % 5)] for i in range(24)]
    rows = [{"prompt": " ".join(w[:2]), "completion": " ".join(w[2:])} for w in words]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model", str(tmp_path / "model"), "--train_file", str(tmp_path / "train.jsonl")),
        *("--num_samples", "8", "--search_samples", "2", "--batch_size", "4", "--max_length", "32"),
        *("--repeats", "1", "--output", str(tmp_path / "cost.json")),
    ]


@pytest.mark.slow
def test_all_rows_are_measured_in_one_run(argv, tmp_path, capsys):
    initialization_cost.main([*argv, "--peers"])
    text = (tmp_path / "cost.md").read_text()
    assert text in capsys.readouterr().out
    for title in initialization_cost.TITLES.values():
        assert f"| {title} | " in text
    assert set(json.loads((tmp_path / "cost.json").read_text())["runs"]) == {
        *initialization_cost.METHODS,
        *initialization_cost.PEERS,
    }
    assert torch.__version__ in text
