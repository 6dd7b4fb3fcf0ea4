"""Progress bars: there for a person who watches, of every pass and solve, and not with --quiet, --json or a pipe."""

import io
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


@pytest.mark.parametrize("flags", [None, ["--quiet"], ["--json"], []], ids=["a person", "quiet", "json", "pipe"])
def test_a_person_sees_bars_and_nobody_else_does(monkeypatch, place, tmp_path, flags):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for show in (enable_progress_bars, datasets.enable_progress_bars, logging.enable_progress_bar):
        show()
    terminal = io.StringIO() if flags == [] else Terminal()
    words = ["init", place / "model", place / "train.jsonl", tmp_path / "out", *PAIRS, *SMALL, *(flags or [])]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert main([str(word) for word in words]) == 0, terminal.getvalue()
    shown = terminal.getvalue()
    assert [bar in shown for bar in BARS] == [flags is None] * 3
    assert ("%|" in shown) == (flags is None)
