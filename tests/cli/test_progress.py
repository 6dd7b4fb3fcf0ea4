"""Progress bars: there for a person who watches, of every pass and solve, and not with --quiet, --json or a pipe."""

import io
import json
import sys

import datasets
import pytest
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from lora_da_hf.cli.main import main

SMALL = ["--block_size", 32, "--lora_rank", 2, "--da_num_samples", 12, "--da_search_samples", 2]
PAIRS = ["--prompt_column", "prompt", "--completion_column", "completion"]
BARS = ["LoRA-DA statistics", "LoRA-DA solve", "Tokenising training"]


class Terminal(io.StringIO):
    """What a person watches."""

    def isatty(self):
        return True


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Return ``watched(*words) -> what a terminal shows``; the libraries' bars are on again afterwards."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shown = [enable_progress_bars, datasets.enable_progress_bars, logging.enable_progress_bar]

    def run(*words, terminal=None):
        terminal = terminal or Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert main([str(word) for word in words]) == 0, terminal.getvalue()
        return terminal.getvalue()

    for show in shown:
        show()
    yield run
    for show in shown:
        show()


def init(place, out, *flags):
    return ["init", place / "model", place / "train.jsonl", out, *PAIRS, *SMALL, *flags]


def test_a_person_sees_bars_of_the_pass_and_the_solve(watched, place, tmp_path):
    shown = watched(*init(place, tmp_path / "out", "--da_save_statistics", "true"))
    assert all(bar in shown for bar in BARS)
    assert "100%|" in shown
    solved = ["refit", tmp_path / "out", tmp_path / "again", "--da_input_damping", "0.3*mean"]
    assert "LoRA-DA solve: " in watched(*solved)
    assert "%|" not in watched(*solved, "--overwrite", "--quiet")


@pytest.mark.parametrize("flags", [["--quiet"], ["--json"], []], ids=["quiet", "json", "pipe"])
def test_nobody_else_does(watched, place, tmp_path, capfd, flags):
    terminal = Terminal() if flags else io.StringIO()
    shown = watched(*init(place, tmp_path / "out", *flags), terminal=terminal)
    assert not [bar for bar in BARS if f"{bar}:" in shown]
    assert "%|" not in shown
    result = capfd.readouterr().out
    assert "%|" not in result
    if flags == ["--json"]:
        assert json.loads(result)["layers"] == 14
