"""The README is short. Its blocks run in tests/hub/test_walk_the_documents.py."""

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 900


def test_its_first_table_is_what_the_lines_say():
    lines = README.read_text(encoding="utf-8").split("| cost |\n")[1].split("\n\n")[0].splitlines()[1:]
    measured = (README.parent / "benchmarks" / "results" / "usual.md").read_text(encoding="utf-8").splitlines()
    for *_, plain, ours, less, _, _ in (line.split("|") for line in lines):
        wanted = [f"|{plain}± ", f"|{ours}± ", f"|{less}|"]
        assert any(all(part in row for part in wanted) for row in measured), less
