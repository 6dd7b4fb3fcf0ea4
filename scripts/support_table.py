"""Write docs/support.md: a row for each test that is marked `support`, so that nothing untested is claimed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "support.md"
TESTS = ("tests/families", "tests/losses", "tests/trainers", "tests/variants", "tests/training")
SECTIONS = {
    "Families": """Each is initialised with the trainer that is named, trained three steps, saved, and loaded again to
the same logits. Its statistics are compared with autograd's gradients and, where a layer can be hooked, with moments
taken one sample at a time. Linear layers are targeted, and the parameters of experts.""",
    "Losses": "What the statistics of a batch are made of. Each is compared with one sample at a time.",
    "Trainers": "",
    "PEFT": "",
}
INTRODUCTION = """# What is supported

Every row is a test on a small model with random weights, which fails if an adapter was left at PEFT's default in
silence. `python scripts/support_table.py` writes this page from the marks of the tests, and a test compares the two.
`make support` runs them all, which takes about two minutes; `make test-all` runs them too, among others.
Layers that keep PEFT's own initialisation are listed in the report of the run.
"""


class _Collector:
    """Keeps the `support` mark of every collected test."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[str, str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("support"):
                section, what, remark = mark.args
                self.rows.setdefault((section, what), (remark, item.nodeid.partition("[")[0]))


def collect_rows() -> dict[tuple[str, str], tuple[str, str]]:
    """Return remark and test of each row, by section and name."""
    collector = _Collector()
    status = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *TESTS], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit("the tests cannot be collected")
    return collector.rows


def table(rows: dict[tuple[str, str], tuple[str, str]]) -> str:
    """Return the page."""
    unknown = {section for section, _ in rows} - set(SECTIONS)
    if unknown:
        raise SystemExit(f"no such section: {sorted(unknown)}")
    parts = [INTRODUCTION]
    for section, text in SECTIONS.items():
        parts.append(f"## {section}\n")
        parts += [f"{text}\n"] if text else []
        lines = [f"| {what} | {remark} | `{test}` |" for (s, what), (remark, test) in rows.items() if s == section]
        parts.append("\n".join(["| what | how | test |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page differs from the tests")
    check = parser.parse_args().check
    found = table(collect_rows())
    if not check:
        TABLE.write_text(found, encoding="utf-8")
    elif TABLE.read_text(encoding="utf-8") != found:
        sys.exit("docs/support.md differs from the tests: run python scripts/support_table.py")


if __name__ == "__main__":
    main()
