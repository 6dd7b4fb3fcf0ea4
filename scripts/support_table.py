"""Write docs/support.md: a row for each test that is marked `support`, so that nothing untested is claimed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "support.md"
TESTS = ("tests/families", "tests/losses", "tests/trainers", "tests/variants", "tests/training")
SECTIONS = {
    "Families": """Each is initialised with the trainer that is named, trained three steps, saved, and loaded again to
the same logits. Its statistics are compared with autograd's gradients and with one sample at a time. All linear layers
are adapted, and the parameters of experts.""",
    "Losses": "The statistics of a batch equal those of single samples, or of one batch if it cannot be split.",
    "Trainers": "",
    "PEFT": "",
}
INTRODUCTION = """# What is supported

Each row is a test on a small model with random weights. It fails if training started from PEFT's default, and it is
never skipped. `make support` runs them all; `python scripts/support_table.py` writes this page from their marks. A
layer that keeps PEFT's own initialisation is listed in the report of the run.
"""


@dataclass(frozen=True)
class Row:
    """How one thing is supported, by which test, and the mark of the test or of one of its cases."""

    remark: str
    test: str
    mark: pytest.Mark


class _Collector:
    """Keeps the `support` mark of every collected test, and what is wrong with them."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.errors: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.errors.append(f"{report.nodeid} was skipped, with all its rows: install the extras that it needs")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("support"):
                section, what, remark = mark.args
                row = Row(remark, item.nodeid.partition("[")[0], mark)
                known = self.rows.setdefault((section, what), row)
                if known.mark is not mark:
                    self.errors.append(f"{section}, {what}: two rows of one name, by {known.test} and {row.test}")
                self.errors += [
                    f"{section}, {what}: {item.nodeid} is marked {name}, and a row must be a test that runs"
                    for name in ("skip", "skipif", "xfail")
                    if item.get_closest_marker(name)
                ]


def collect_rows() -> dict[tuple[str, str], Row]:
    """Return the row of each section and name; two of one name, and tests that do not run, end the program."""
    collector = _Collector()
    status = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *TESTS], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit("the tests cannot be collected")
    if collector.errors:
        raise SystemExit("\n".join(collector.errors))
    return collector.rows


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for section, text in SECTIONS.items():
        parts.append(f"## {section}\n")
        parts += [f"{text}\n"] if text else []
        lines = [f"| {what} | {row.remark} | `{row.test}` |" for (s, what), row in rows.items() if s == section]
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
