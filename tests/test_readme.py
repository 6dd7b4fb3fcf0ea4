"""The README is short. Its blocks run in tests/hub/test_walk_the_documents.py."""

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 900
