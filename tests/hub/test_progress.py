"""Progress bars of what goes over the network."""

import functools
import io
import sys

import pytest
from huggingface_hub.utils import enable_progress_bars

import lora_da_hf.hub
from lora_da_hf.artifacts.manifest import MANIFEST_FILE
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.cli.main import main


class Terminal(io.StringIO):
    """What a person watches."""

    def isatty(self):
        return True


@pytest.fixture
def watched(hub, monkeypatch):
    """Return ``watched(*words) -> what a terminal shows`` of a command against the Hub of the tests."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for name in ("push_init", "pull_init"):
        verb = functools.partial(getattr(lora_da_hf.hub, name), endpoint=hub.endpoint)
        monkeypatch.setattr(lora_da_hf.hub, name, verb)

    def run(*words):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert main([str(word) for word in words]) == 0, terminal.getvalue()
        return terminal.getvalue()

    enable_progress_bars()
    yield run
    enable_progress_bars()


def test_a_person_sees_bars_of_uploads_and_downloads(watched, init, tmp_path):
    assert "%|" in watched("push", init, "alice/init")
    shown = watched("pull", "alice/init", "--cache_dir", tmp_path / "cache")
    assert MANIFEST_FILE in shown
    assert shown.count("100%|") >= len(load_init(init).manifest.files)


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_nobody_sees_them_otherwise(watched, init, tmp_path, flag):
    assert "%|" not in watched("push", init, "alice/init", flag)
    assert "%|" not in watched("pull", "alice/init", "--cache_dir", tmp_path / "cache", flag)
